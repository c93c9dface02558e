/*
 * Random calls with random handles: sequence CALLS [SEED]. Four threads share eight slots of handles of any
 * kind, good, stale, NULL and made up, and callbacks call too. Every call must return a status it may return,
 * every started call must call back exactly once, and the library must work at the end.
 */
#include "check.h"

#define SLOTS 8
#define THREADS 4

static void *slots[SLOTS];
static long calls_left;
static long started, called_back, statuses[13], lost_calls;

static void *slot_get(int n) { return __atomic_load_n(&slots[n], __ATOMIC_SEQ_CST); }
static void *slot_swap(int n, void *with) { return __atomic_exchange_n(&slots[n], with, __ATOMIC_SEQ_CST); }

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}
static int below(uint64_t *state, int limit) { return (int)(next(state) % (uint64_t)limit); }

static int32_t count(int32_t status) {
    CHECK(status >= 0 && status <= 12 && status != ETCDLOCK_INTERNAL);
    if (status != ETCDLOCK_OK)
        CHECK(etcdlock_last_error()[0] != '\0');
    __atomic_add_fetch(&statuses[status], 1, __ATOMIC_RELAXED);
    return status;
}

/* Whatever it is, it is freed by one of these, or was before. */
static void free_any(void *it) {
    if (it != NULL)
        CHECK((etcdlock_mutex_free((etcdlock_mutex *)it) == ETCDLOCK_OK) + (etcdlock_op_free((etcdlock_op *)it) == ETCDLOCK_OK) +
                  (etcdlock_options_free((etcdlock_options *)it) == ETCDLOCK_OK) +
                  (etcdlock_session_free((etcdlock_session *)it) == ETCDLOCK_OK) <= 1);
}

/* Two slots are for sessions, four for mutexes, one each for options and started calls. */
enum kind { SESSION, MUTEX, OPTIONS, OP };
static int slot_of(uint64_t *state, enum kind kind) {
    return kind == SESSION ? below(state, 2) : kind == MUTEX ? 2 + below(state, 4) : kind == OPTIONS ? 6 : 7;
}

static void put(uint64_t *state, enum kind kind, void *made) { free_any(slot_swap(slot_of(state, kind), made)); }

/* A handle: mostly one of the kind, which may be freed; sometimes of another, or nonsense. */
static void *any(uint64_t *state, enum kind kind) {
    switch (below(state, 40)) {
    case 0:
        return NULL;
    case 1:
        return (void *)(uintptr_t)next(state);
    case 2: { /* nearly a handle */
        const uintptr_t near = (uintptr_t)slot_get(below(state, SLOTS)) ^ ((uintptr_t)1 << below(state, 64));
        return (void *)near;
    }
    case 3:
        return state;
    case 4:
    case 5:
        return slot_get(below(state, SLOTS));
    default:
        return slot_get(slot_of(state, kind));
    }
}

static void some_call(uint64_t *state, int inside);

static void done(int32_t status, int64_t token, void *seed) {
    CHECK(status >= 0 && status <= 11 && (token > 0) <= (status == ETCDLOCK_OK));
    uint64_t state = (uint64_t)(uintptr_t)seed | 1;
    for (int n = below(&state, 3); n > 0; n--)
        some_call(&state, 1);
    __atomic_add_fetch(&called_back, 1, __ATOMIC_SEQ_CST);
}

static void lost(int32_t reason, void *seed) {
    CHECK(reason > 0 && reason <= 8);
    uint64_t state = (uint64_t)(uintptr_t)seed | 1;
    some_call(&state, 1);
    __atomic_add_fetch(&lost_calls, 1, __ATOMIC_SEQ_CST);
}

static void log_line(int32_t level, const char *target, const char *message, void *data) {
    CHECK(level > 0 && level <= 5 && strlen(target) > 0 && strlen(message) > 0 && data == NULL);
}

static void contender(const etcdlock_contender *contender, void *data) {
    CHECK(contender->token > 0 && strlen(contender->key) > 0 && data == NULL);
    uint64_t state = (uint64_t)contender->token * 77 | 1;
    some_call(&state, 0);
}

static void some_call(uint64_t *state, int inside) {
    static const char *const targets[] = {"memory:sequence", "memory:other", "memory:sequence", "redis://x", "\xff\xfe", ""};
    static const char *const names[] = {"a", "b", "a/b", "a", "b", "a/b", "", "\xff", NULL};
    static const int64_t times[] = {0, 1, 2, 0, 1, 2, -2, INT64_MIN};
    etcdlock_session *session = (etcdlock_session *)any(state, SESSION), *opened = NULL;
    etcdlock_mutex *mutex = (etcdlock_mutex *)any(state, MUTEX), *made = NULL;
    etcdlock_options *options = (etcdlock_options *)any(state, OPTIONS);
    etcdlock_op *op = NULL, *known = (etcdlock_op *)any(state, OP);
    const char *name = names[below(state, 9)];
    const int64_t time = times[below(state, 8)];
    void *seed = (void *)(uintptr_t)next(state);
    char buffer[4];
    int64_t length;
    etcdlock_stats stats;
    __atomic_sub_fetch(&calls_left, 1, __ATOMIC_RELAXED);
    switch (below(state, 42)) {
    case 0:
    case 1: {
        const char *target = targets[below(state, 4)];
        if (count(etcdlock_session_open(target, below(state, 2) ? options : NULL, &opened)) == ETCDLOCK_OK)
            put(state, SESSION, opened);
        else
            CHECK(opened == NULL);
        break;
    }
    case 2:
    case 3:
    case 4:
    case 5:
    case 6:
        if (count(etcdlock_mutex_new(session, name, &made)) == ETCDLOCK_OK)
            put(state, MUTEX, made);
        else
            CHECK(made == NULL);
        break;
    case 7:
        options = etcdlock_options_new();
        CHECK(options != NULL);
        put(state, OPTIONS, options);
        break;
    case 8:
    case 9:
    case 10:
        count(etcdlock_mutex_lock(mutex, time));
        break;
    case 11:
    case 12:
        count(etcdlock_mutex_try_lock(mutex));
        break;
    case 13:
    case 14:
    case 15:
        count(etcdlock_mutex_unlock(mutex));
        break;
    case 16:
    case 17:
    case 18:
        if (count(etcdlock_mutex_lock_start(mutex, time, done, seed, below(state, 2) ? &op : NULL)) == ETCDLOCK_OK) {
            __atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
            if (op != NULL)
                put(state, OP, op);
        } else
            CHECK(op == NULL);
        break;
    case 19:
        if (count(etcdlock_mutex_unlock_start(mutex, done, seed, NULL)) == ETCDLOCK_OK)
            __atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
        break;
    case 20:
    case 21:
        count(etcdlock_op_cancel(known));
        break;
    case 22:
        count(etcdlock_op_free(known));
        break;
    case 23:
        if (below(state, 4) == 0)
            count(etcdlock_mutex_free(mutex));
        break;
    case 24:
        if (below(state, 8) == 0)
            count(etcdlock_session_free(session));
        break;
    case 25:
        if (below(state, 8) == 0)
            count(etcdlock_session_close(session, time));
        break;
    case 26:
        count(etcdlock_options_free(options));
        break;
    case 27:
        count(etcdlock_options_set_ttl_ms(options, 2000 + below(state, 2000)));
        break;
    case 28:
        count(etcdlock_options_set_owner(options, name));
        break;
    case 29:
        count(etcdlock_options_set_max_hold_ms(options, time));
        break;
    case 30:
        CHECK(etcdlock_mutex_is_held(mutex) >= 0 && etcdlock_mutex_is_held(mutex) <= 1);
        break;
    case 31:
        CHECK(etcdlock_mutex_remaining_ms(mutex) >= 0 && etcdlock_mutex_token(mutex) >= 0);
        break;
    case 32:
        count(etcdlock_mutex_check(mutex));
        CHECK(etcdlock_mutex_loss(mutex) >= 0 && etcdlock_mutex_loss(mutex) <= 8);
        break;
    case 33:
    case 34:
        count(etcdlock_mutex_on_lost(mutex, below(state, 8) ? lost : NULL, seed));
        break;
    case 35:
        count(etcdlock_mutex_put(mutex, below(state, 8) ? "k" : NULL, (size_t)below(state, 2), "v", 1));
        break;
    case 36:
        count(etcdlock_mutex_get(mutex, "k", 1, below(state, 4) ? buffer : NULL, sizeof buffer, &length));
        break;
    case 37:
        count(etcdlock_mutex_delete(mutex, "k", 1));
        break;
    case 38:
        if (!inside)
            count(etcdlock_session_inspect(session, name, below(state, 8) ? contender : NULL, NULL));
        break;
    case 39:
        count(etcdlock_session_stats(session, &stats, sizeof stats));
        CHECK(etcdlock_session_ttl_ms(session) >= 0 && etcdlock_session_lease_id(session) >= 0);
        break;
    case 40:
        count(etcdlock_set_log(below(state, 8) - 1, below(state, 2) ? log_line : NULL, NULL));
        break;
    default:
        count(etcdlock_flush_callbacks(time));
        if (below(state, 400) == 0)
            count(etcdlock_shutdown(time));
        CHECK(strlen(etcdlock_status_name((int32_t)next(state))) > 0);
        break;
    }
}

static void *caller(void *seed) {
    uint64_t state = (uint64_t)(uintptr_t)seed | 1;
    while (__atomic_load_n(&calls_left, __ATOMIC_RELAXED) > 0)
        some_call(&state, 0);
    return NULL;
}

int main(int argc, char **argv) {
    const long calls = argc > 1 ? atol(argv[1]) : 120000;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)time(NULL) * 2654435761U;
    printf("sequence: %ld calls, seed %llu\n", calls, (unsigned long long)seed);
    fflush(stdout);
    alarm(600); /* a hang is a failure */
    calls_left = calls;
    pthread_t threads[THREADS];
    for (int n = 0; n < THREADS; n++)
        CHECK(pthread_create(&threads[n], NULL, caller, (void *)(uintptr_t)(next(&seed) + (uint64_t)n)) == 0);
    for (int n = 0; n < THREADS; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);

    OK(etcdlock_set_log(ETCDLOCK_LOG_OFF, NULL, NULL));
    OK(etcdlock_shutdown(20000)); /* ends what still waits */
    for (int left = PATIENCE_S * 100;; left--) {
        OK(etcdlock_flush_callbacks(-1));
        if (__atomic_load_n(&called_back, __ATOMIC_SEQ_CST) == __atomic_load_n(&started, __ATOMIC_SEQ_CST))
            break;
        CHECK(left > 0);
        usleep(10000);
    }
    for (int n = 0; n < SLOTS; n++)
        free_any(slot_swap(n, NULL));
    OK(etcdlock_flush_callbacks(-1));
    CHECK(called_back == started);

    etcdlock_session *session = NULL;
    etcdlock_mutex *mutex = NULL;
    OK(etcdlock_session_open("memory:sequence", NULL, &session));
    OK(etcdlock_mutex_new(session, "a", &mutex));
    OK(etcdlock_mutex_lock(mutex, PATIENCE_S * 1000));
    OK(etcdlock_mutex_free(mutex));
    OK(etcdlock_session_close(session, 20000));
    printf("sequence: %ld started and called back, %ld losses told;", started, lost_calls);
    for (int status = 0; status <= 12; status++)
        if (statuses[status] > 0)
            printf(" %s %ld", etcdlock_status_name(status), statuses[status]);
    printf("\n");
    return 0;
}
