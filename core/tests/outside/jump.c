/* A preloaded library whose clocks jump, as when somebody sets the wall clock, or when the machine was suspended.
 * $CLOCK_JUMP: "wall" or "boot", and seconds. The jump comes when the file $CLOCK_JUMP_FILE is there. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
	static const char *jump, *file;
	long result = syscall(SYS_clock_gettime, clock, now);
	if (!file) {
		jump = getenv("CLOCK_JUMP");
		file = getenv("CLOCK_JUMP_FILE");
	}
	if (result == 0 && jump && file && access(file, F_OK) == 0) {
		clockid_t jumps = strncmp(jump, "wall", 4) == 0 ? CLOCK_REALTIME : CLOCK_BOOTTIME;
		if (clock == jumps) now->tv_sec += atol(jump + 5);
	}
	return (int)result;
}
