/*
 * Increments the number in a file, as many processes may do at once: counter TARGET FILE ROUNDS lock|nolock
 *
 * Reading, adding one and writing are three steps. Without the lock, increments get lost.
 *
 *     cc counter.c $(pkg-config --cflags --libs etcdlock) -o counter
 */
#define _POSIX_C_SOURCE 200809L
#include <etcdlock.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void check(int32_t status) {
    if (status != ETCDLOCK_OK) {
        fprintf(stderr, "counter: %s: %s\n", etcdlock_status_name(status), etcdlock_last_error());
        exit(1);
    }
}

static int64_t microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static uint64_t read_number(const char *path) {
    uint64_t number = 0;
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        if (fscanf(file, "%" SCNu64, &number) != 1)
            number = 0;
        fclose(file);
    }
    return number;
}

static void write_number(const char *path, uint64_t number) {
    // In place and always ten digits: one step, so that a reader never finds half a number.
    FILE *file = fopen(path, "r+");
    if (file == NULL || fprintf(file, "%010" PRIu64, number) < 0 || fclose(file) != 0) {
        perror(path);
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: counter TARGET FILE ROUNDS lock|nolock\n");
        return 64;
    }
    const char *target = argv[1], *file = argv[2];
    const long rounds = atol(argv[3]);
    const int locks = strcmp(argv[4], "lock") == 0;

    etcdlock_options *options = etcdlock_options_new();
    etcdlock_session *session;
    etcdlock_mutex *mutex;
    check(etcdlock_options_set_ttl_ms(options, 10000));
    check(etcdlock_session_open(target, options, &session));
    check(etcdlock_options_free(options));
    check(etcdlock_mutex_new(session, "/demo/counter", &mutex));

    for (long round = 0; round < rounds; round++) {
        const int64_t start = microseconds();
        if (locks)
            check(etcdlock_mutex_lock(mutex, -1));
        const int64_t waited = microseconds() - start;

        const uint64_t value = read_number(file) + 1;
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
        write_number(file, value);

        if (locks)
            printf("token=%" PRId64, etcdlock_mutex_token(mutex));
        else
            printf("token=-");
        printf(" value=%" PRIu64 " waited_us=%" PRId64 "\n", value, waited);
        fflush(stdout);
        if (locks)
            check(etcdlock_mutex_unlock(mutex));
    }
    check(etcdlock_mutex_free(mutex));
    check(etcdlock_session_close(session, 5000));
    return 0;
}
