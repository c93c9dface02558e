/* etcdlock for C as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS. */
#include <etcdlock.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void check(int32_t status) {
    if (status != ETCDLOCK_OK) {
        fprintf(stderr, "%s\n", etcdlock_last_error());
        exit(1);
    }
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc < 5) return 64;
    int puts_only = strcmp(argv[1], "put") == 0, rounds = atoi(argv[4]);
    const char *key = argv[3];
    char name[256], line[16];
    snprintf(name, sizeof name, "%s%s", key, puts_only ? ".guard" : "");
    long long *took = calloc((size_t)rounds, sizeof *took);
    etcdlock_session *session;
    etcdlock_mutex *mutex;
    check(etcdlock_session_open(argv[2], NULL, &session));
    check(etcdlock_mutex_new(session, name, &mutex));
    if (puts_only) check(etcdlock_mutex_lock(mutex, -1));
    puts("ready");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) return 1;
    for (int i = 0; i < rounds; i++) {
        long long start = now();
        if (puts_only) {
            check(etcdlock_mutex_put(mutex, key, strlen(key), "x", 1));
        } else {
            check(etcdlock_mutex_lock(mutex, -1));
            check(etcdlock_mutex_unlock(mutex));
        }
        took[i] = now() - start;
    }
    for (int i = 0; i < rounds; i++) printf("enter 0 %lld\n", took[i]);
    free(took);
    etcdlock_mutex_free(mutex);
    check(etcdlock_session_close(session, 5000));
    return 0;
}
