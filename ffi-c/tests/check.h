/* What the C tests share: checks that end the program with a telling line, and an event to wait for. */
#ifndef CHECK_H
#define CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <etcdlock.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fflush(stdout);                                                                                           \
            fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition,                   \
                    etcdlock_last_error());                                                                           \
            _exit(1);                                                                                                 \
        }                                                                                                             \
    } while (0)

/* The status of a call. */
#define IS(expected, call)                                                                                            \
    do {                                                                                                              \
        const int32_t got_ = (call);                                                                                  \
        if (got_ != (expected)) {                                                                                     \
            fprintf(stderr, "%s:%d: %s is %s, not %s (last error: %s)\n", __FILE__, __LINE__, #call,                  \
                    etcdlock_status_name(got_), etcdlock_status_name(expected), etcdlock_last_error());               \
            _exit(1);                                                                                                 \
        }                                                                                                             \
    } while (0)
#define OK(call) IS(ETCDLOCK_OK, call)

/* A hang is a failure; anything slower than this is one. */
#define PATIENCE_S 60

struct event {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int calls;
    int32_t status;
    int64_t token;
    char message[512];
    char thread[32];
};

#define EVENT_INIT {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, {0}, {0}}

static inline void event_happened(struct event *event, int32_t status, int64_t token) {
    pthread_mutex_lock(&event->lock);
    event->calls++;
    event->status = status;
    event->token = token;
    snprintf(event->message, sizeof event->message, "%s", etcdlock_last_error());
    pthread_getname_np(pthread_self(), event->thread, sizeof event->thread);
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
}

static inline void on_done(int32_t status, int64_t token, void *event) { event_happened((struct event *)event, status, token); }
static inline void on_lost(int32_t reason, void *event) { event_happened((struct event *)event, reason, 0); }

/* Waits until it has happened that many times, and says what it was the last time. */
static inline int32_t event_wait(struct event *event, int calls) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE_S;
    pthread_mutex_lock(&event->lock);
    while (event->calls < calls)
        CHECK(pthread_cond_timedwait(&event->changed, &event->lock, &until) == 0);
    const int32_t status = event->status;
    pthread_mutex_unlock(&event->lock);
    return status;
}

static inline int event_calls(struct event *event) {
    pthread_mutex_lock(&event->lock);
    const int calls = event->calls;
    pthread_mutex_unlock(&event->lock);
    return calls;
}

/* A flag between threads, in C and in C++. */
typedef int flag;
static inline void flag_set(flag *it) { __atomic_store_n(it, 1, __ATOMIC_SEQ_CST); }
static inline int flag_is_set(flag *it) { return __atomic_load_n(it, __ATOMIC_SEQ_CST); }

/* A lock name that no other test and no other run uses. */
static inline const char *fresh_name(void) {
    static char names[64][64];
    static int n;
    char *name = names[n % 64];
    snprintf(name, sizeof names[0], "/c-test/%ld/%d", (long)getpid(), n++);
    return name;
}

#endif
