/*
 * The behaviour of the C ABI: suite TARGET. Compiled as C11 and as C++17. Each function that begins with
 * test_ is one sentence about it.
 */
#include "check.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

static const char *target;
static int on_etcd;
static const char *self;

static etcdlock_session *session_with(etcdlock_options *options) {
    etcdlock_session *session = NULL;
    OK(etcdlock_session_open(target, options, &session));
    CHECK(session != NULL);
    return session;
}

static etcdlock_session *open_session(void) { return session_with(NULL); }

static etcdlock_mutex *new_mutex(etcdlock_session *session, const char *name) {
    etcdlock_mutex *mutex = NULL;
    OK(etcdlock_mutex_new(session, name, &mutex));
    CHECK(mutex != NULL);
    return mutex;
}

static void count_contender(const etcdlock_contender *contender, void *count) {
    (void)contender;
    ++*(int *)count;
}

static int contenders(etcdlock_session *session, const char *name) {
    int count = 0;
    OK(etcdlock_session_inspect(session, name, count_contender, &count));
    return count;
}

/* Waits until that many are in the queue; there is no event for what others do. */
static void wait_for_contenders(etcdlock_session *session, const char *name, int expected) {
    for (int left = PATIENCE_S * 100; contenders(session, name) != expected; left--) {
        CHECK(left > 0);
        usleep(10000);
    }
}

static void etcdctl(const char *what, const char *argument) {
    char command[1200];
    snprintf(command, sizeof command, "ETCDCTL_API=3 etcdctl --endpoints %s %s '%s' >/dev/null", target, what, argument);
    CHECK(system(command) == 0);
}

static int message_has(const char *part) { return strstr(etcdlock_last_error(), part) != NULL; }

/* ------------------------------------------------------------------ locks */

static void test_a_lock_is_held_with_a_token_until_it_is_unlocked(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    CHECK(!etcdlock_mutex_is_held(mutex) && etcdlock_mutex_token(mutex) == 0 && etcdlock_mutex_remaining_ms(mutex) == 0);
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_check(mutex));
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_unlock(mutex));
    CHECK(message_has("/c-test/"));

    OK(etcdlock_mutex_lock(mutex, 20000));
    const int64_t token = etcdlock_mutex_token(mutex);
    CHECK(token > 0 && etcdlock_mutex_is_held(mutex));
    CHECK(etcdlock_mutex_remaining_ms(mutex) > 1000 && etcdlock_mutex_remaining_ms(mutex) <= 15000);
    OK(etcdlock_mutex_check(mutex));
    CHECK(etcdlock_mutex_loss(mutex) == ETCDLOCK_LOSS_NONE);

    OK(etcdlock_mutex_unlock(mutex));
    CHECK(!etcdlock_mutex_is_held(mutex) && etcdlock_mutex_token(mutex) == 0);
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_unlock(mutex));

    OK(etcdlock_mutex_try_lock(mutex));
    CHECK(etcdlock_mutex_token(mutex) > token);
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_lock(mutex, 0));
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

static void test_a_lock_that_is_taken_is_busy_or_times_out_and_leaves_nothing(void) {
    etcdlock_session *session = open_session(), *other = open_session();
    const char *name = fresh_name();
    etcdlock_mutex *holder = new_mutex(session, name), *same = new_mutex(session, name), *far = new_mutex(other, name);
    OK(etcdlock_mutex_lock(holder, -1));
    etcdlock_mutex *others[] = {same, far, holder};
    for (int n = 0; n < 3; n++) {
        IS(ETCDLOCK_BUSY, etcdlock_mutex_try_lock(others[n]));
        IS(ETCDLOCK_TIMEOUT, etcdlock_mutex_lock(others[n], 0));
        IS(ETCDLOCK_TIMEOUT, etcdlock_mutex_lock(others[n], 50));
        CHECK(message_has(name));
    }
    CHECK(!etcdlock_mutex_is_held(same) && !etcdlock_mutex_is_held(far) && etcdlock_mutex_is_held(holder));
    wait_for_contenders(session, name, 1);
    OK(etcdlock_mutex_unlock(holder));
    CHECK(contenders(session, name) == 0);
    OK(etcdlock_mutex_try_lock(far));
    OK(etcdlock_mutex_unlock(far));
    OK(etcdlock_mutex_free(holder));
    OK(etcdlock_mutex_free(same));
    OK(etcdlock_mutex_free(far));
    OK(etcdlock_session_close(session, 20000));
    OK(etcdlock_session_close(other, 20000));
}

struct crowd {
    etcdlock_mutex *shared;
    etcdlock_session *session;
    const char *name;
    int rounds;
    int inside;
    long count;
    int64_t last_token;
};

static void *crowd_member(void *arg) {
    struct crowd *crowd = (struct crowd *)arg;
    etcdlock_mutex *own = crowd->shared != NULL ? crowd->shared : new_mutex(crowd->session, crowd->name);
    for (int round = 0; round < crowd->rounds; round++) {
        OK(etcdlock_mutex_lock(own, -1));
        /* Plain numbers: only the lock keeps them right. */
        CHECK(crowd->inside == 0);
        crowd->inside = 1;
        CHECK(etcdlock_mutex_token(own) > crowd->last_token);
        crowd->last_token = etcdlock_mutex_token(own);
        crowd->count++;
        crowd->inside = 0;
        OK(etcdlock_mutex_unlock(own));
    }
    if (crowd->shared == NULL)
        OK(etcdlock_mutex_free(own));
    return NULL;
}

static void sixteen_threads(struct crowd *crowd) {
    pthread_t threads[16];
    for (int n = 0; n < 16; n++)
        CHECK(pthread_create(&threads[n], NULL, crowd_member, crowd) == 0);
    for (int n = 0; n < 16; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);
    CHECK(crowd->count == 16L * crowd->rounds);
}

static void test_sixteen_threads_exclude_each_other_with_one_mutex_and_with_one_each(void) {
    etcdlock_session *session = open_session();
    struct crowd crowd = {NULL, session, fresh_name(), 20, 0, 0, 0};
    sixteen_threads(&crowd);
    crowd.name = fresh_name();
    crowd.shared = new_mutex(session, crowd.name);
    crowd.count = crowd.last_token = 0;
    sixteen_threads(&crowd);
    OK(etcdlock_mutex_free(crowd.shared));
    OK(etcdlock_session_close(session, 20000));
}

static void *unlocks(void *mutex) {
    OK(etcdlock_mutex_unlock((etcdlock_mutex *)mutex));
    return NULL;
}

static void test_any_thread_may_unlock(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    OK(etcdlock_mutex_lock(mutex, -1));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, unlocks, mutex) == 0 && pthread_join(thread, NULL) == 0);
    CHECK(!etcdlock_mutex_is_held(mutex));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

static void test_freeing_a_mutex_that_holds_releases_the_lock(void) {
    etcdlock_session *session = open_session();
    const char *name = fresh_name();
    etcdlock_mutex *holder = new_mutex(session, name), *waiter = new_mutex(session, name);
    OK(etcdlock_mutex_lock(holder, -1));
    OK(etcdlock_mutex_free(holder));
    OK(etcdlock_mutex_lock(waiter, PATIENCE_S * 1000));
    OK(etcdlock_mutex_free(waiter));
    wait_for_contenders(session, name, 0);
    OK(etcdlock_session_close(session, 20000));
}

static void test_a_mutex_outlives_the_handle_of_its_session(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    OK(etcdlock_session_free(session));
    IS(ETCDLOCK_INVALID, etcdlock_session_free(session));
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_free(mutex));
}

/* ------------------------------------------------------------------ arguments */

static void test_a_handle_that_is_null_freed_or_of_another_kind_gives_a_status(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name()), *freed = new_mutex(session, fresh_name());
    etcdlock_options *options = etcdlock_options_new();
    OK(etcdlock_mutex_free(freed));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_free(freed));
    CHECK(message_has("has been freed"));

    int here = 0;
    void *bad[] = {NULL, freed, session, options, &here, malloc(16), (void *)1, (void *)-1, (void *)"text"};
    int64_t length = 4711;
    for (size_t n = 0; n < sizeof bad / sizeof *bad; n++) {
        etcdlock_mutex *m = (etcdlock_mutex *)bad[n];
        IS(ETCDLOCK_INVALID, etcdlock_mutex_lock(m, 0));
        CHECK(message_has("etcdlock_mutex"));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_try_lock(m));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_unlock(m));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_check(m));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_on_lost(m, on_lost, NULL));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_put(m, "k", 1, "v", 1));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_get(m, "k", 1, NULL, 0, &length));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_delete(m, "k", 1));
        etcdlock_op *op = (etcdlock_op *)&here;
        IS(ETCDLOCK_INVALID, etcdlock_mutex_lock_start(m, 0, on_done, NULL, &op));
        IS(ETCDLOCK_INVALID, etcdlock_mutex_unlock_start(m, on_done, NULL, &op));
        CHECK(op == (etcdlock_op *)&here && length == 4711);
        CHECK(etcdlock_mutex_is_held(m) == 0 && etcdlock_mutex_token(m) == 0);
        CHECK(etcdlock_mutex_remaining_ms(m) == 0 && etcdlock_mutex_loss(m) == ETCDLOCK_LOSS_NONE);
        if (m != NULL)
            IS(ETCDLOCK_INVALID, etcdlock_mutex_free(m));
        IS(ETCDLOCK_INVALID, etcdlock_op_cancel((etcdlock_op *)m));
        if (m != NULL)
            IS(ETCDLOCK_INVALID, etcdlock_op_free((etcdlock_op *)m));
        bad[2] = mutex; /* for those that want a session */
        etcdlock_session *s = n == 2 ? (etcdlock_session *)mutex : (etcdlock_session *)bad[n];
        bad[2] = session;
        etcdlock_mutex *out = (etcdlock_mutex *)&here;
        etcdlock_stats stats;
        IS(ETCDLOCK_INVALID, etcdlock_mutex_new(s, "a", &out));
        CHECK(out == (etcdlock_mutex *)&here);
        IS(ETCDLOCK_INVALID, etcdlock_session_inspect(s, "a", count_contender, &here));
        IS(ETCDLOCK_INVALID, etcdlock_session_stats(s, &stats, sizeof stats));
        CHECK(etcdlock_session_ttl_ms(s) == 0 && etcdlock_session_lease_id(s) == 0);
        if (s != NULL) {
            IS(ETCDLOCK_INVALID, etcdlock_session_close(s, 0));
            IS(ETCDLOCK_INVALID, etcdlock_session_free(s));
        }
        etcdlock_options *o = bad[n] == (void *)options ? (etcdlock_options *)mutex : (etcdlock_options *)bad[n];
        etcdlock_session *opened = (etcdlock_session *)&here;
        IS(ETCDLOCK_INVALID, etcdlock_options_set_ttl_ms(o, 5000));
        IS(ETCDLOCK_INVALID, etcdlock_options_set_owner(o, "x"));
        if (o != NULL) {
            IS(ETCDLOCK_INVALID, etcdlock_options_free(o));
            IS(ETCDLOCK_INVALID, etcdlock_session_open(target, o, &opened));
            CHECK(opened == (etcdlock_session *)&here);
        }
    }
    free(bad[5]);
    OK(etcdlock_mutex_free(NULL));
    OK(etcdlock_session_free(NULL));
    OK(etcdlock_session_close(NULL, 0));
    OK(etcdlock_options_free(NULL));
    OK(etcdlock_op_free(NULL));
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_options_free(options));
    IS(ETCDLOCK_INVALID, etcdlock_options_free(options));
    OK(etcdlock_session_close(session, 20000));
    IS(ETCDLOCK_INVALID, etcdlock_session_close(session, 20000));
}

static void test_a_stale_handle_does_not_reach_a_later_object(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *stale = new_mutex(session, fresh_name()), *later[1000];
    OK(etcdlock_mutex_free(stale));
    for (int n = 0; n < 1000; n++) {
        later[n] = new_mutex(session, fresh_name());
        CHECK(later[n] != stale);
        if (n % 2 == 0) /* so that places are used again */
            OK(etcdlock_mutex_free(later[n]));
    }
    IS(ETCDLOCK_INVALID, etcdlock_mutex_lock(stale, 0));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_free(stale));
    for (int n = 0; n < 1000; n++)
        IS(n % 2 == 0 ? ETCDLOCK_INVALID : ETCDLOCK_OK, etcdlock_mutex_free(later[n]));
    OK(etcdlock_session_close(session, 20000));
}

static void test_a_bad_argument_is_named_with_its_rule(void) {
    etcdlock_session *session = open_session(), *untouched = session;
    etcdlock_mutex *mutex = new_mutex(session, fresh_name()), *out = NULL;
    char huge[5000];
    memset(huge, 'x', sizeof huge);
    huge[sizeof huge - 1] = '\0';

    IS(ETCDLOCK_INVALID, etcdlock_mutex_new(session, NULL, &out));
    CHECK(message_has("name is NULL"));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_new(session, "", &out));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_new(session, huge, &out));
    CHECK(message_has("1024"));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_new(session, "a\xff", &out));
    CHECK(message_has("UTF-8 from byte 1"));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_new(session, "a", NULL));
    CHECK(out == NULL);

    IS(ETCDLOCK_INVALID, etcdlock_session_open("redis://a", NULL, &session));
    CHECK(message_has("redis"));
    IS(ETCDLOCK_INVALID, etcdlock_session_open("\xff", NULL, &session));
    IS(ETCDLOCK_INVALID, etcdlock_session_open(target, NULL, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_session_inspect(session, "a", NULL, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_session_inspect(session, "", count_contender, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_session_stats(session, NULL, sizeof(etcdlock_stats)));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_lock_start(mutex, 0, NULL, NULL, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_on_lost(mutex, NULL, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_set_log(6, NULL, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_set_log(-1, NULL, NULL));

    const int64_t negative[] = {-2, -1000, INT64_MIN};
    for (int n = 0; n < 3; n++) {
        IS(ETCDLOCK_INVALID, etcdlock_mutex_lock(mutex, negative[n]));
        CHECK(message_has("negative"));
        IS(ETCDLOCK_INVALID, etcdlock_session_close(session, negative[n]));
        IS(ETCDLOCK_INVALID, etcdlock_shutdown(negative[n]));
        IS(ETCDLOCK_INVALID, etcdlock_flush_callbacks(negative[n]));
    }
    OK(etcdlock_mutex_lock(mutex, INT64_MAX));
    int64_t length = 4711;
    IS(ETCDLOCK_INVALID, etcdlock_mutex_put(mutex, "", 0, "v", 1));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_put(mutex, NULL, 3, "v", 1));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_put(mutex, "k", 1, NULL, 1));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_put(mutex, "k", SIZE_MAX, "v", 1));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_get(mutex, "k", 1, NULL, 5, &length));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_get(mutex, "k", 1, NULL, 0, NULL));
    IS(ETCDLOCK_INVALID, etcdlock_mutex_delete(mutex, NULL, 0));
    CHECK(length == 4711 && session == untouched);
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, INT64_MAX));
}

static void test_options_are_set_one_by_one_and_checked_when_used(void) {
    etcdlock_options *options = etcdlock_options_new();
    etcdlock_session *session = NULL;
    IS(ETCDLOCK_INVALID, etcdlock_options_set_ttl_ms(options, -1));
    OK(etcdlock_options_set_ttl_ms(options, 1000));
    IS(ETCDLOCK_INVALID, etcdlock_session_open(target, options, &session));
    CHECK(message_has("too short") && session == NULL);
    OK(etcdlock_options_set_ttl_ms(options, 7000));
    OK(etcdlock_options_set_connect_timeout_ms(options, 0));
    IS(ETCDLOCK_INVALID, etcdlock_session_open(target, options, &session));
    OK(etcdlock_options_set_connect_timeout_ms(options, 20000));
    IS(ETCDLOCK_INVALID, etcdlock_options_set_max_hold_ms(options, -5));
    OK(etcdlock_options_set_max_hold_ms(options, 60000));
    IS(ETCDLOCK_INVALID, etcdlock_options_set_owner(options, NULL));
    OK(etcdlock_options_set_owner(options, "the owner"));
    OK(etcdlock_options_set_namespace(options, "/space"));
    OK(etcdlock_session_open(target, options, &session));
    CHECK(etcdlock_session_ttl_ms(session) == 7000 && etcdlock_session_lease_id(session) != 0);
    OK(etcdlock_session_close(session, 20000));

    OK(etcdlock_options_set_user(options, "u"));
    IS(ETCDLOCK_INVALID, etcdlock_session_open(target, options, &session));
    CHECK(message_has("password"));
    OK(etcdlock_options_set_password(options, "p"));
    OK(etcdlock_options_set_cert(options, "c"));
    IS(ETCDLOCK_INVALID, etcdlock_session_open(target, options, &session));
    CHECK(message_has("cert"));
    OK(etcdlock_options_set_key(options, "k"));
    OK(etcdlock_options_set_ca(options, "c"));
    OK(etcdlock_options_set_server_name(options, "s"));
    OK(etcdlock_options_free(options));

    /* What is given is copied: it may change or go at once. */
    char copied[] = "memory:copied", name[] = "copied";
    OK(etcdlock_session_open(copied, NULL, &session));
    memset(copied, 'x', sizeof copied - 1);
    etcdlock_mutex *mutex = new_mutex(session, name);
    memset(name, 'x', sizeof name - 1);
    OK(etcdlock_mutex_lock(mutex, -1));
    CHECK(contenders(session, "copied") == 1);
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

static void *fails_elsewhere(void *unused) {
    (void)unused;
    CHECK(strcmp(etcdlock_last_error(), "") == 0);
    IS(ETCDLOCK_INVALID, etcdlock_mutex_lock(NULL, 0));
    return NULL;
}

static void test_the_last_error_is_one_for_each_thread_and_stays_on_success(void) {
    etcdlock_session *session = NULL;
    IS(ETCDLOCK_INVALID, etcdlock_session_open("redis://a", NULL, &session));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, fails_elsewhere, NULL) == 0 && pthread_join(thread, NULL) == 0);
    CHECK(message_has("redis"));
    OK(etcdlock_mutex_free(NULL));
    CHECK(message_has("redis"));
}

static void test_versions_names_and_counters_are_told(void) {
    CHECK(strcmp(etcdlock_version(), ETCDLOCK_VERSION) == 0);
    CHECK(strcmp(etcdlock_status_name(ETCDLOCK_OK), "OK") == 0);
    CHECK(strcmp(etcdlock_status_name(ETCDLOCK_NOT_HELD), "NOT_HELD") == 0);
    CHECK(strcmp(etcdlock_status_name(-5), "UNKNOWN") == 0);

    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    OK(etcdlock_mutex_lock(mutex, -1));
    struct {
        etcdlock_stats stats;
        uint64_t beyond;
    } place;
    place.beyond = place.stats.requests = place.stats.renewals = 4711;
    OK(etcdlock_session_stats(session, &place.stats, 3 * sizeof(uint64_t)));
    CHECK(place.stats.locks == 1 && place.stats.waits == 0 && place.stats.hand_overs == 0);
    CHECK(place.stats.renewals == 4711);
    OK(etcdlock_session_stats(session, &place.stats, sizeof place));
    CHECK(place.stats.requests > 0 && place.stats.requests != 4711 && place.beyond == 4711);
    IS(ETCDLOCK_INVALID, etcdlock_session_stats(session, &place.stats, 0));
    IS(ETCDLOCK_INVALID, etcdlock_session_stats(session, &place.stats, 7));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

/* ------------------------------------------------------------------ guarded writes, inspect */

static void test_guarded_requests_work_only_while_the_lock_is_held(void) {
    etcdlock_session *session = open_session();
    const char *name = fresh_name();
    char key[100];
    snprintf(key, sizeof key, "%s-state", name);
    const size_t key_len = strlen(key);
    etcdlock_mutex *mutex = new_mutex(session, name);
    int64_t length = 4711;
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_put(mutex, key, key_len, "v", 1));
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_get(mutex, key, key_len, NULL, 0, &length));
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_delete(mutex, key, key_len));
    CHECK(length == 4711);

    OK(etcdlock_mutex_lock(mutex, -1));
    char buffer[8] = "unused";
    OK(etcdlock_mutex_get(mutex, key, key_len, buffer, sizeof buffer, &length));
    CHECK(length == -1 && strcmp(buffer, "unused") == 0);
    OK(etcdlock_mutex_put(mutex, key, key_len, "a\0b\xff", 4));
    OK(etcdlock_mutex_get(mutex, key, key_len, buffer, 3, &length));
    CHECK(length == 4 && strcmp(buffer, "unused") == 0);
    OK(etcdlock_mutex_get(mutex, key, key_len, buffer, 4, &length));
    CHECK(length == 4 && memcmp(buffer, "a\0b\xff" "ed", 6) == 0);
    OK(etcdlock_mutex_put(mutex, key, key_len, NULL, 0));
    OK(etcdlock_mutex_get(mutex, key, key_len, NULL, 0, &length));
    CHECK(length == 0);
    OK(etcdlock_mutex_delete(mutex, key, key_len));
    OK(etcdlock_mutex_delete(mutex, key, key_len));
    OK(etcdlock_mutex_get(mutex, key, key_len, NULL, 0, &length));
    CHECK(length == -1);
    OK(etcdlock_mutex_unlock(mutex));
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_put(mutex, key, key_len, "v", 1));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

struct seen {
    int count;
    int64_t tokens[4];
};

static void sees(const etcdlock_contender *contender, void *arg) {
    struct seen *seen = (struct seen *)arg;
    CHECK(contender->is_holder == (seen->count == 0));
    CHECK(strcmp(contender->language, "c") == 0 && contender->pid == (uint32_t)getpid());
    CHECK(strcmp(contender->owner, seen->count == 0 ? "first" : "second") == 0);
    CHECK(contender->host[0] != '\0' && contender->key[0] == '/' && contender->age_ms >= 0);
    seen->tokens[seen->count++] = contender->token;
}

static void test_inspect_shows_holder_and_waiters_in_order(void) {
    etcdlock_options *options = etcdlock_options_new();
    OK(etcdlock_options_set_owner(options, "first"));
    etcdlock_session *first = session_with(options);
    const char *name = fresh_name();
    etcdlock_mutex *holder = new_mutex(first, name);
    struct seen seen = {0, {0}};
    OK(etcdlock_session_inspect(first, name, sees, &seen));
    CHECK(seen.count == 0);
    OK(etcdlock_mutex_lock(holder, -1));
    OK(etcdlock_session_inspect(first, name, sees, &seen));
    CHECK(seen.count == 1 && seen.tokens[0] == etcdlock_mutex_token(holder));
    if (on_etcd) {
        /* One process queues once for a name; a connection of another kind stands for another process. */
        OK(etcdlock_options_set_owner(options, "second"));
        OK(etcdlock_options_set_server_name(options, "another"));
        etcdlock_session *second = session_with(options);
        etcdlock_mutex *waiter = new_mutex(second, name);
        struct event got = EVENT_INIT;
        OK(etcdlock_mutex_lock_start(waiter, -1, on_done, &got, NULL));
        wait_for_contenders(first, name, 2);
        seen.count = 0;
        OK(etcdlock_session_inspect(first, name, sees, &seen));
        CHECK(seen.count == 2 && seen.tokens[0] == etcdlock_mutex_token(holder));
        OK(etcdlock_mutex_unlock(holder));
        CHECK(event_wait(&got, 1) == ETCDLOCK_OK && got.token == seen.tokens[1]);
        OK(etcdlock_mutex_free(waiter));
        OK(etcdlock_session_close(second, 20000));
    }
    OK(etcdlock_options_free(options));
    OK(etcdlock_mutex_free(holder));
    OK(etcdlock_session_close(first, 20000));
}

/* ------------------------------------------------------------------ callbacks */

static void test_a_started_lock_calls_back_exactly_once_on_the_notify_thread(void) {
    etcdlock_session *session = open_session();
    const char *name = fresh_name();
    etcdlock_mutex *mutex = new_mutex(session, name), *other = new_mutex(session, name);
    struct event got = EVENT_INIT, waits = EVENT_INIT, freed = EVENT_INIT;
    etcdlock_op *op = NULL, *waiting = NULL;
    OK(etcdlock_mutex_lock_start(mutex, -1, on_done, &got, &op));
    CHECK(event_wait(&got, 1) == ETCDLOCK_OK && strcmp(got.thread, "etcdlock-notify") == 0);
    CHECK(got.token > 0 && got.token == etcdlock_mutex_token(mutex));
    OK(etcdlock_op_cancel(op)); /* too late, and fine */
    OK(etcdlock_op_free(op));
    IS(ETCDLOCK_INVALID, etcdlock_op_free(op));
    IS(ETCDLOCK_INVALID, etcdlock_op_cancel(op));

    OK(etcdlock_mutex_lock_start(other, -1, on_done, &waits, &waiting));
    OK(etcdlock_op_cancel(waiting));
    CHECK(event_wait(&waits, 1) == ETCDLOCK_CANCELLED && waits.token == 0 && waits.message[0] != '\0');
    OK(etcdlock_op_cancel(waiting));
    OK(etcdlock_op_free(waiting));

    OK(etcdlock_mutex_lock_start(other, 30, on_done, &waits, NULL));
    CHECK(event_wait(&waits, 2) == ETCDLOCK_TIMEOUT && strstr(waits.message, name) != NULL);

    /* A handle that is freed early lets the call go on; so does a freed mutex, with nobody to have it. */
    OK(etcdlock_mutex_lock_start(other, -1, on_done, &freed, &waiting));
    OK(etcdlock_op_free(waiting));
    OK(etcdlock_mutex_free(other));
    OK(etcdlock_mutex_unlock_start(mutex, on_done, &got, NULL));
    CHECK(event_wait(&got, 2) == ETCDLOCK_OK && got.token == 0);
    CHECK(event_wait(&freed, 1) == ETCDLOCK_OK);
    OK(etcdlock_mutex_unlock_start(mutex, on_done, &got, NULL));
    CHECK(event_wait(&got, 3) == ETCDLOCK_NOT_HELD);
    wait_for_contenders(session, name, 0);
    OK(etcdlock_flush_callbacks(-1));
    CHECK(event_calls(&got) == 3 && event_calls(&waits) == 2 && event_calls(&freed) == 1);
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

struct inside {
    etcdlock_session *session;
    etcdlock_mutex *mutex, *held;
    struct event done;
};

static void calls_everything(int32_t status, int64_t token, void *arg) {
    struct inside *inside = (struct inside *)arg;
    etcdlock_session *opened = NULL;
    int64_t length = 0;
    IS(ETCDLOCK_DEADLOCK, etcdlock_session_open(target, NULL, &opened));
    IS(ETCDLOCK_DEADLOCK, etcdlock_session_close(inside->session, 0));
    IS(ETCDLOCK_DEADLOCK, etcdlock_session_inspect(inside->session, "a", count_contender, &length));
    IS(ETCDLOCK_DEADLOCK, etcdlock_mutex_lock(inside->mutex, 0));
    IS(ETCDLOCK_DEADLOCK, etcdlock_mutex_try_lock(inside->mutex));
    IS(ETCDLOCK_DEADLOCK, etcdlock_mutex_unlock(inside->held));
    IS(ETCDLOCK_DEADLOCK, etcdlock_mutex_put(inside->held, "k", 1, "v", 1));
    IS(ETCDLOCK_DEADLOCK, etcdlock_mutex_get(inside->held, "k", 1, NULL, 0, &length));
    IS(ETCDLOCK_DEADLOCK, etcdlock_mutex_delete(inside->held, "k", 1));
    IS(ETCDLOCK_DEADLOCK, etcdlock_flush_callbacks(0));
    IS(ETCDLOCK_DEADLOCK, etcdlock_shutdown(0));
    CHECK(message_has("callback"));
    etcdlock_mutex *made = NULL;
    OK(etcdlock_mutex_new(inside->session, "made-inside", &made));
    OK(etcdlock_mutex_free(made));
    CHECK(etcdlock_mutex_is_held(inside->held) && !etcdlock_mutex_is_held(inside->mutex));
    OK(etcdlock_mutex_check(inside->held));
    event_happened(&inside->done, status, token);
    OK(etcdlock_mutex_unlock_start(inside->held, on_done, &inside->done, NULL));
}

static void test_a_blocking_call_inside_a_callback_is_refused_and_starts_nothing(void) {
    struct inside inside = {open_session(), NULL, NULL, EVENT_INIT};
    inside.mutex = new_mutex(inside.session, fresh_name());
    inside.held = new_mutex(inside.session, fresh_name());
    OK(etcdlock_mutex_lock_start(inside.held, -1, calls_everything, &inside, NULL));
    CHECK(event_wait(&inside.done, 2) == ETCDLOCK_OK);
    CHECK(!etcdlock_mutex_is_held(inside.mutex) && !etcdlock_mutex_is_held(inside.held));
    OK(etcdlock_mutex_lock(inside.mutex, -1));
    OK(etcdlock_mutex_free(inside.mutex));
    OK(etcdlock_mutex_free(inside.held));
    OK(etcdlock_session_close(inside.session, 20000));
}

struct slow {
    struct event gate, began;
    flag is_over;
};

static void is_slow(int32_t status, int64_t token, void *arg) {
    struct slow *slow = (struct slow *)arg;
    event_happened(&slow->began, status, token);
    event_wait(&slow->gate, 1);
    flag_set(&slow->is_over);
}

static void test_flushing_waits_for_a_callback_that_runs_and_a_slow_one_costs_no_lock(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name()), *other = new_mutex(session, fresh_name());
    struct slow slow = {EVENT_INIT, EVENT_INIT, 0};
    OK(etcdlock_mutex_lock_start(mutex, -1, is_slow, &slow, NULL));
    event_wait(&slow.began, 1);
    IS(ETCDLOCK_TIMEOUT, etcdlock_flush_callbacks(20));
    OK(etcdlock_mutex_lock(other, PATIENCE_S * 1000));
    OK(etcdlock_mutex_unlock(other));
    CHECK(etcdlock_mutex_is_held(mutex) && !flag_is_set(&slow.is_over));
    event_happened(&slow.gate, 0, 0);
    OK(etcdlock_flush_callbacks(-1));
    CHECK(flag_is_set(&slow.is_over));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_mutex_free(other));
    OK(etcdlock_session_close(session, 20000));
}

static void test_a_loss_is_told_once_with_its_reason_and_never_after_a_release(void) {
    etcdlock_session *session = open_session();
    const char *name = fresh_name();
    etcdlock_mutex *mutex = new_mutex(session, name);
    struct event lost = EVENT_INIT, released = EVENT_INIT;
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_on_lost(mutex, on_lost, &lost));
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &released));
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &lost));
    const int64_t token = etcdlock_mutex_token(mutex);
    OK(etcdlock_session_close(session, 20000));
    CHECK(event_wait(&lost, 1) == ETCDLOCK_LOSS_CLOSED && strstr(lost.message, "closed") != NULL);
    CHECK(strcmp(lost.thread, "etcdlock-notify") == 0);
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &lost)); /* lost already: at once */
    CHECK(event_wait(&lost, 2) == ETCDLOCK_LOSS_CLOSED);
    CHECK(etcdlock_mutex_token(mutex) == token && !etcdlock_mutex_is_held(mutex));
    CHECK(etcdlock_mutex_loss(mutex) == ETCDLOCK_LOSS_CLOSED);
    IS(ETCDLOCK_LOST, etcdlock_mutex_check(mutex));
    IS(ETCDLOCK_LOST, etcdlock_mutex_put(mutex, "k", 1, "v", 1));
    IS(ETCDLOCK_LOST, etcdlock_mutex_unlock(mutex));
    IS(ETCDLOCK_NOT_HELD, etcdlock_mutex_unlock(mutex));
    OK(etcdlock_flush_callbacks(-1));
    CHECK(event_calls(&lost) == 2 && event_calls(&released) == 0);
    OK(etcdlock_mutex_free(mutex));
}

static void finds_key(const etcdlock_contender *contender, void *key) { snprintf((char *)key, 1000, "%s", contender->key); }

static void test_a_key_deleted_or_a_lease_revoked_from_outside_is_told_and_the_session_goes_on(void) {
    if (!on_etcd) {
        printf("    (on etcd only: memory: has no outside)\n");
        return;
    }
    if (system("command -v etcdctl >/dev/null") != 0) {
        printf("    (skipped: there is no etcdctl on the PATH)\n");
        return;
    }
    etcdlock_session *session = open_session();
    const char *name = fresh_name();
    etcdlock_mutex *mutex = new_mutex(session, name);
    struct event lost = EVENT_INIT;
    char key[1000] = "";
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &lost));
    OK(etcdlock_session_inspect(session, name, finds_key, key));
    etcdctl("del", key);
    CHECK(event_wait(&lost, 1) == ETCDLOCK_LOSS_KEY_DELETED);
    IS(ETCDLOCK_LOST, etcdlock_mutex_unlock(mutex));

    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &lost));
    const int64_t lease = etcdlock_session_lease_id(session);
    snprintf(key, sizeof key, "%llx", (unsigned long long)lease);
    etcdctl("lease revoke", key);
    const int32_t reason = event_wait(&lost, 2);
    CHECK(reason == ETCDLOCK_LOSS_LEASE_GONE || reason == ETCDLOCK_LOSS_KEY_DELETED);
    IS(ETCDLOCK_LOST, etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_lock(mutex, PATIENCE_S * 1000));
    CHECK(etcdlock_session_lease_id(session) != lease);
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

struct log {
    struct event event;
    char target[64], message[256];
};

static void on_log(int32_t level, const char *log_target, const char *message, void *arg) {
    struct log *log = (struct log *)arg;
    if (level == ETCDLOCK_LOG_WARN) {
        snprintf(log->target, sizeof log->target, "%s", log_target);
        snprintf(log->message, sizeof log->message, "%s", message);
        IS(ETCDLOCK_DEADLOCK, etcdlock_flush_callbacks(0));
        event_happened(&log->event, level, 0);
    }
}

static void lose_a_hold(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    OK(etcdlock_mutex_lock(mutex, -1));
    struct event lost = EVENT_INIT;
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &lost));
    OK(etcdlock_session_close(session, 20000));
    /* Freed at once it might be released before its loss is noticed, and then it is no loss. */
    event_wait(&lost, 1);
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_flush_callbacks(-1));
}

static void test_the_log_goes_to_the_callback_at_its_level_until_it_is_switched_off(void) {
    static struct log log = {EVENT_INIT, {0}, {0}};
    log.event.calls = 0;
    OK(etcdlock_set_log(ETCDLOCK_LOG_TRACE, on_log, &log));
    lose_a_hold();
    CHECK(event_wait(&log.event, 1) == ETCDLOCK_LOG_WARN && strcmp(log.event.thread, "etcdlock-notify") == 0);
    CHECK(strcmp(log.target, "etcdlock::loss") == 0 && strstr(log.message, "hold lost") == log.message);
    OK(etcdlock_set_log(ETCDLOCK_LOG_ERROR, on_log, &log));
    OK(etcdlock_flush_callbacks(-1));
    const int so_far = event_calls(&log.event);
    lose_a_hold();
    OK(etcdlock_set_log(ETCDLOCK_LOG_OFF, NULL, NULL));
    lose_a_hold();
    CHECK(event_calls(&log.event) == so_far);
}

/* ------------------------------------------------------------------ the end of things */

struct waiting {
    etcdlock_mutex *mutex;
    int32_t status;
};

static void *waits_for_lock(void *arg) {
    struct waiting *waiting = (struct waiting *)arg;
    waiting->status = etcdlock_mutex_lock(waiting->mutex, -1);
    return NULL;
}

static void test_closing_a_session_ends_the_calls_that_wait(void) {
    etcdlock_session *session = open_session(), *other = open_session();
    const char *name = fresh_name();
    etcdlock_mutex *holder = new_mutex(other, name);
    OK(etcdlock_mutex_lock(holder, -1));
    struct waiting waiting = {new_mutex(session, name), -1};
    struct event called = EVENT_INIT;
    OK(etcdlock_mutex_lock_start(waiting.mutex, -1, on_done, &called, NULL));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, waits_for_lock, &waiting) == 0);
    OK(etcdlock_session_close(session, 20000));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(waiting.status == ETCDLOCK_CLOSED && event_wait(&called, 1) == ETCDLOCK_CLOSED);
    IS(ETCDLOCK_CLOSED, etcdlock_mutex_lock(waiting.mutex, -1));
    OK(etcdlock_mutex_free(waiting.mutex));
    CHECK(etcdlock_mutex_is_held(holder));
    OK(etcdlock_mutex_free(holder));
    OK(etcdlock_session_close(other, 20000));
}

static void wait_for_child(pid_t child) {
    int status = 0;
    for (int left = PATIENCE_S * 100; waitpid(child, &status, WNOHANG) == 0; left--) {
        if (left == 0)
            kill(child, SIGKILL);
        CHECK(left > 0);
        usleep(10000);
    }
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* The whole way out, with handlers. Under memcheck by way of another program: to a forked child everything that
 * only the threads of its parent knew of is lost, which is no leak of the library. */
static void leave_child(void) {
    fflush(NULL);
    if (getenv("ETCDLOCK_MEMCHECK") != NULL)
        execl("/bin/true", "true", (char *)NULL);
    exit(0);
}

static void in_a_forked_child(etcdlock_session *session, etcdlock_mutex *mutex, etcdlock_options *options, const char *name) {
    int64_t length = 0;
    etcdlock_mutex *out = NULL;
    CHECK(!etcdlock_mutex_is_held(mutex) && etcdlock_mutex_token(mutex) == 0);
    IS(ETCDLOCK_FORKED, etcdlock_mutex_lock(mutex, -1));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_try_lock(mutex));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_unlock(mutex));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_check(mutex));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_put(mutex, "k", 1, "v", 1));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_lock_start(mutex, -1, on_done, NULL, NULL));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_new(session, "a", &out));
    IS(ETCDLOCK_FORKED, etcdlock_session_inspect(session, "a", count_contender, &length));
    IS(ETCDLOCK_FORKED, etcdlock_session_close(session, -1));
    IS(ETCDLOCK_FORKED, etcdlock_session_free(session));
    IS(ETCDLOCK_FORKED, etcdlock_mutex_free(mutex));
    IS(ETCDLOCK_FORKED, etcdlock_options_free(options));
    CHECK(message_has("fork"));
    OK(etcdlock_shutdown(0));

    /* It may connect anew, and finds the lock taken by its parent; memory: is another in each process. */
    etcdlock_session *own = open_session();
    etcdlock_mutex *same = new_mutex(own, name);
    IS(on_etcd ? ETCDLOCK_BUSY : ETCDLOCK_OK, etcdlock_mutex_try_lock(same));
    struct event called = EVENT_INIT;
    OK(etcdlock_mutex_lock_start(same, 0, on_done, &called, NULL));
    CHECK(event_wait(&called, 1) == ETCDLOCK_TIMEOUT);
    OK(etcdlock_mutex_free(same));
    OK(etcdlock_session_close(own, 20000));
}

static void test_after_a_fork_the_child_has_nothing_and_the_parent_keeps_everything(void) {
    etcdlock_session *session = open_session();
    etcdlock_options *options = etcdlock_options_new();
    const char *name = fresh_name();
    etcdlock_mutex *mutex = new_mutex(session, name);
    struct event lost = EVENT_INIT;
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_on_lost(mutex, on_lost, &lost));
    const int64_t token = etcdlock_mutex_token(mutex);
    fflush(NULL);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        in_a_forked_child(session, mutex, options, name);
        /* And its own child, one generation on. */
        fflush(NULL);
        const pid_t grandchild = fork();
        if (grandchild == 0) {
            in_a_forked_child(session, mutex, options, name);
            leave_child();
        }
        wait_for_child(grandchild);
        leave_child();
    }
    wait_for_child(child);
    CHECK(etcdlock_mutex_is_held(mutex) && etcdlock_mutex_token(mutex) == token);
    CHECK(contenders(session, name) == 1 && event_calls(&lost) == 0);
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_options_free(options));
    OK(etcdlock_session_close(session, 20000));
}

static flag stop_it;

static void *is_busy(void *arg) {
    etcdlock_session *session = (etcdlock_session *)arg;
    while (!flag_is_set(&stop_it)) {
        etcdlock_mutex *mutex = new_mutex(session, "busy");
        OK(etcdlock_mutex_lock(mutex, -1));
        OK(etcdlock_mutex_unlock(mutex));
        OK(etcdlock_mutex_free(mutex));
    }
    return NULL;
}

static void test_a_fork_in_the_middle_of_calls_of_other_threads_does_not_hang_the_child(void) {
    etcdlock_session *session = open_session();
    pthread_t threads[3];
    for (int n = 0; n < 3; n++)
        CHECK(pthread_create(&threads[n], NULL, is_busy, session) == 0);
    for (int round = 0; round < 30; round++) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            etcdlock_session *own = NULL;
            IS(ETCDLOCK_FORKED, etcdlock_session_free(session));
            OK(etcdlock_session_open("memory:child", NULL, &own));
            etcdlock_mutex *mutex = new_mutex(own, "own");
            OK(etcdlock_mutex_lock(mutex, -1));
            OK(etcdlock_mutex_unlock(mutex));
            OK(etcdlock_session_close(own, 20000));
            leave_child();
        }
        wait_for_child(child);
    }
    flag_set(&stop_it);
    for (int n = 0; n < 3; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);
    OK(etcdlock_session_close(session, 20000));
}

static int open_descriptors(int *inheritable) {
    int count = 0;
    *inheritable = 0;
    for (int fd = 3; fd < 256; fd++) {
        const int flags = fcntl(fd, F_GETFD);
        if (flags >= 0) {
            count++;
            *inheritable += (flags & FD_CLOEXEC) == 0;
        }
    }
    return count;
}

static int inheritable_at_first;

static void test_exec_while_holding_leaks_no_descriptor(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    OK(etcdlock_mutex_lock(mutex, -1));
    int inheritable = 0;
    CHECK(open_descriptors(&inheritable) > 0 && inheritable == inheritable_at_first);
    if (getenv("ETCDLOCK_MEMCHECK") != NULL) {
        printf("    (without the exec under memcheck, whose own descriptors would be counted)\n");
        OK(etcdlock_mutex_free(mutex));
        OK(etcdlock_session_close(session, 20000));
        return;
    }
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        char expected[20];
        snprintf(expected, sizeof expected, "%d", inheritable_at_first);
        execl(self, self, "--count-descriptors", expected, (char *)NULL);
        _exit(2);
    }
    wait_for_child(child);
    CHECK(etcdlock_mutex_is_held(mutex));
    OK(etcdlock_mutex_unlock(mutex));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
}

static void test_a_target_that_is_not_there_is_unavailable_in_time(void) {
    etcdlock_options *options = etcdlock_options_new();
    etcdlock_session *session = NULL;
    OK(etcdlock_options_set_connect_timeout_ms(options, 100));
    IS(ETCDLOCK_UNAVAILABLE, etcdlock_session_open("127.0.0.1:1", options, &session));
    CHECK(message_has("127.0.0.1:1") && session == NULL);
    OK(etcdlock_options_free(options));
}

static void test_shutdown_closes_every_session(void) {
    etcdlock_session *session = open_session();
    etcdlock_mutex *mutex = new_mutex(session, fresh_name());
    OK(etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_shutdown(20000));
    CHECK(!etcdlock_mutex_is_held(mutex));
    IS(ETCDLOCK_CLOSED, etcdlock_mutex_lock(mutex, -1));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_free(session));
    OK(etcdlock_shutdown(20000));
}

#define TEST(name) {#name, test_##name}
static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    TEST(a_lock_is_held_with_a_token_until_it_is_unlocked),
    TEST(a_lock_that_is_taken_is_busy_or_times_out_and_leaves_nothing),
    TEST(sixteen_threads_exclude_each_other_with_one_mutex_and_with_one_each),
    TEST(any_thread_may_unlock),
    TEST(freeing_a_mutex_that_holds_releases_the_lock),
    TEST(a_mutex_outlives_the_handle_of_its_session),
    TEST(a_handle_that_is_null_freed_or_of_another_kind_gives_a_status),
    TEST(a_stale_handle_does_not_reach_a_later_object),
    TEST(a_bad_argument_is_named_with_its_rule),
    TEST(options_are_set_one_by_one_and_checked_when_used),
    TEST(the_last_error_is_one_for_each_thread_and_stays_on_success),
    TEST(versions_names_and_counters_are_told),
    TEST(guarded_requests_work_only_while_the_lock_is_held),
    TEST(inspect_shows_holder_and_waiters_in_order),
    TEST(a_started_lock_calls_back_exactly_once_on_the_notify_thread),
    TEST(a_blocking_call_inside_a_callback_is_refused_and_starts_nothing),
    TEST(flushing_waits_for_a_callback_that_runs_and_a_slow_one_costs_no_lock),
    TEST(a_loss_is_told_once_with_its_reason_and_never_after_a_release),
    TEST(a_key_deleted_or_a_lease_revoked_from_outside_is_told_and_the_session_goes_on),
    TEST(the_log_goes_to_the_callback_at_its_level_until_it_is_switched_off),
    TEST(closing_a_session_ends_the_calls_that_wait),
    TEST(after_a_fork_the_child_has_nothing_and_the_parent_keeps_everything),
    TEST(a_fork_in_the_middle_of_calls_of_other_threads_does_not_hang_the_child),
    TEST(exec_while_holding_leaks_no_descriptor),
    TEST(a_target_that_is_not_there_is_unavailable_in_time),
    TEST(shutdown_closes_every_session),
};

int main(int argc, char **argv) {
    open_descriptors(&inheritable_at_first);
    self = argv[0];
    if (argc == 3 && strcmp(argv[1], "--count-descriptors") == 0)
        return inheritable_at_first == atoi(argv[2]) ? 0 : 1;
    target = argc > 1 ? argv[1] : getenv("ETCDLOCK_ENDPOINTS");
    if (target == NULL) {
        fprintf(stderr, "usage: suite TARGET [PART OF A TEST'S NAME]\n");
        return 64;
    }
    on_etcd = strncmp(target, "memory:", 7) != 0;
    int count = 0;
    for (size_t n = 0; n < sizeof tests / sizeof *tests; n++) {
        if (argc > 2 && strstr(tests[n].name, argv[2]) == NULL)
            continue;
        printf("  %s\n", tests[n].name);
        fflush(stdout);
        tests[n].run();
        count++;
    }
    printf("  %d tests passed on %s\n", count, on_etcd ? "etcd" : target);
    return count > 0 ? 0 : 1;
}
