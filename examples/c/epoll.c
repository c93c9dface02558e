/*
 * Waits for a lock in an event loop, without a thread of its own: epoll [TARGET [ROUNDS]]
 *
 * The library calls back on its own thread, which must not run the program's logic. So the callback only puts
 * the outcome where the loop finds it and writes to an eventfd; the loop does the rest. It locks, works for 5 ms
 * by a timer, unlocks, and so on, and would serve its sockets all the while.
 */
#define _GNU_SOURCE
#include <etcdlock.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

struct outcome {
    int fd;
    int32_t status;
    int64_t token;
};

/* On the library's thread. The write makes the outcome visible to the loop. */
static void tell_the_loop(int32_t status, int64_t token, void *data) {
    struct outcome *outcome = data;
    outcome->status = status;
    outcome->token = token;
    if (eventfd_write(outcome->fd, 1) != 0)
        perror("eventfd");
}

static void check(int32_t status) {
    if (status != ETCDLOCK_OK) {
        fprintf(stderr, "epoll: %s: %s\n", etcdlock_status_name(status), etcdlock_last_error());
        exit(1);
    }
}

static void watch(int loop, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (fd < 0 || epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event) != 0) {
        perror("epoll");
        exit(1);
    }
}

int main(int argc, char **argv) {
    long rounds = argc > 2 ? atol(argv[2]) : 3;
    etcdlock_session *session;
    etcdlock_mutex *mutex;
    check(etcdlock_session_open(argc > 1 ? argv[1] : "", NULL, &session));
    check(etcdlock_mutex_new(session, "/demo/epoll", &mutex));

    const int loop = epoll_create1(EPOLL_CLOEXEC);
    const int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    struct outcome locked = {.fd = eventfd(0, EFD_CLOEXEC)}, unlocked = {.fd = eventfd(0, EFD_CLOEXEC)};
    watch(loop, locked.fd);
    watch(loop, unlocked.fd);
    watch(loop, timer);
    check(etcdlock_mutex_lock_start(mutex, 10000, tell_the_loop, &locked, NULL));

    while (rounds > 0) {
        struct epoll_event event;
        uint64_t count;
        if (epoll_wait(loop, &event, 1, -1) != 1 || read(event.data.fd, &count, sizeof count) != sizeof count)
            continue;
        if (event.data.fd == locked.fd) {
            if (locked.status != ETCDLOCK_OK) {
                fprintf(stderr, "epoll: %s\n", etcdlock_status_name(locked.status));
                return 1;
            }
            printf("locked, token %" PRId64 "\n", locked.token);
            timerfd_settime(timer, 0, &(struct itimerspec){.it_value.tv_nsec = 5000000}, NULL);
        } else if (event.data.fd == timer) {
            check(etcdlock_mutex_unlock_start(mutex, tell_the_loop, &unlocked, NULL));
        } else {
            printf("unlocked: %s\n", etcdlock_status_name(unlocked.status));
            if (--rounds > 0)
                check(etcdlock_mutex_lock_start(mutex, 10000, tell_the_loop, &locked, NULL));
        }
    }
    close(loop);
    close(timer);
    check(etcdlock_mutex_free(mutex));
    check(etcdlock_session_close(session, 5000));
    close(locked.fd);
    close(unlocked.fd);
    return 0;
}
