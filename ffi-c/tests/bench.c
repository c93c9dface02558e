/* What the C ABI costs: bench TARGET. One line for each figure. */
#include "check.h"

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int compare(const void *a, const void *b) {
    const double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

int main(int argc, char **argv) {
    enum { PAIRS = 5000 };
    static double took[PAIRS];
    const char *target = argc > 1 ? argv[1] : "";
    etcdlock_session *session = NULL;
    etcdlock_mutex *mutex = NULL;
    OK(etcdlock_session_open(target, NULL, &session));
    OK(etcdlock_mutex_new(session, "/c-test/bench", &mutex));
    for (int n = 0; n < PAIRS; n++) {
        const double start = now();
        OK(etcdlock_mutex_lock(mutex, -1));
        OK(etcdlock_mutex_unlock(mutex));
        took[n] = now() - start;
    }
    qsort(took, PAIRS, sizeof *took, compare);
    printf("c lock+unlock on %s: median %.1f us, p99 %.1f us\n", target[0] ? target : "etcd", took[PAIRS / 2] * 1e6,
           took[PAIRS * 99 / 100] * 1e6);
    OK(etcdlock_mutex_lock(mutex, -1));
    double best = 1;
    long held = 0;
    for (int round = 0; round < 20; round++) {
        const double start = now();
        for (int n = 0; n < 100000; n++)
            held += etcdlock_mutex_is_held(mutex);
        const double each = (now() - start) / 100000;
        best = each < best ? each : best;
    }
    CHECK(held == 2000000);
    printf("c etcdlock_mutex_is_held: %.1f ns\n", best * 1e9);
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
    return 0;
}
