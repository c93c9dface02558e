/* The suite's driver for C: a thread for each request; a lock is called back. See ../README.md. */

#include <etcdlock.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Handles by their name; one that is used again is replaced. */
typedef struct { char name[64]; void *handle; } slot;
static slot sessions[4096], mutexes[4096];
static struct { int64_t id; etcdlock_op *op; } locks[4096];
static pthread_mutex_t world = PTHREAD_MUTEX_INITIALIZER;

typedef struct { char *line; int64_t id, from; } request;
typedef struct { char name[64]; int64_t token; etcdlock_mutex *mutex; } listener;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void *find(slot *slots, const char *name, void *put) {
    void *found = NULL;
    pthread_mutex_lock(&world);
    for (int i = 0; i < 4096; i++) {
        if (slots[i].name[0] && strcmp(slots[i].name, name)) continue;
        if (put) { snprintf(slots[i].name, sizeof slots[i].name, "%s", name); slots[i].handle = put; }
        found = slots[i].handle;
        break;
    }
    pthread_mutex_unlock(&world);
    return found;
}

/* The members of a request are flat, and its texts have no escapes. NULL if it is not there. */
static const char *member(const request *r, const char *name) {
    char pattern[64];
    snprintf(pattern, sizeof pattern, "\"%s\":", name);
    const char *found = strstr(r->line, pattern);
    return found ? found + strlen(pattern) : NULL;
}
static char *text(const request *r, const char *name) {
    const char *start = member(r, name);
    return start ? strndup(start + 1, strcspn(start + 1, "\"")) : NULL;
}
static int64_t number(const request *r, const char *name, int64_t otherwise) {
    const char *start = member(r, name);
    return start ? strtoll(start, NULL, 10) : otherwise;
}

/* A text as JSON. */
static const char *quoted(const char *s, char *out) {
    char *o = out;
    for (*o++ = '"'; *s; s++) {
        if (*s == '"' || *s == '\\') *o++ = '\\', *o++ = *s;
        else if ((unsigned char)*s < 32) o += sprintf(o, "\\u%04x", *s);
        else *o++ = *s;
    }
    *o++ = '"', *o = 0;
    return out;
}

static void answer(const request *r, int32_t status, const char *result) {
    char message[8192];
    if (status == ETCDLOCK_OK)
        printf("{\"id\":%" PRId64 ",\"from\":%" PRId64 ",\"at\":%" PRId64 "%s}\n", r->id, r->from, now(), result);
    else
        printf("{\"id\":%" PRId64 ",\"from\":%" PRId64 ",\"at\":%" PRId64 ",\"kind\":\"%s\",\"message\":%s}\n", r->id, r->from, now(),
               etcdlock_status_name(status), quoted(etcdlock_last_error(), message));
}

static char *state(etcdlock_mutex *mutex, char *out) {
    int64_t seen = now(), remaining = etcdlock_mutex_remaining_ms(mutex);
    sprintf(out, ",\"held\":%s,\"remaining\":%" PRId64 ",\"token\":%" PRId64 ",\"seen\":%" PRId64,
            etcdlock_mutex_is_held(mutex) ? "true" : "false", remaining, etcdlock_mutex_token(mutex), seen);
    return out;
}

static void lost(int32_t reason, void *data) {
    listener *of = data;
    char quote[8192];
    (void)reason;
    printf("{\"event\":\"lost\",\"mutex\":\"%s\",\"token\":%" PRId64 ",\"reason\":%s,\"at\":%" PRId64 "}\n", of->name, of->token,
           quoted(etcdlock_last_error(), quote), now());
}

static void granted(int32_t status, int64_t token, void *data) {
    request *r = data;
    char *name = text(r, "mutex"), out[256] = "";
    if (status == ETCDLOCK_OK) {
        listener *of = malloc(sizeof *of);
        of->mutex = find(mutexes, name, NULL), of->token = token;
        snprintf(of->name, sizeof of->name, "%s", name);
        etcdlock_mutex_on_lost(of->mutex, lost, of);
        state(of->mutex, out);
    }
    answer(r, status, out);
}

typedef struct { char *end; int any; } list;
static void each(const etcdlock_contender *c, void *data) {
    list *l = data;
    char owner[2048], host[512], key[4096];
    l->end += sprintf(l->end, "%s{\"holder\":%s,\"owner\":%s,\"host\":%s,\"pid\":%" PRIu32 ",\"language\":\"%s\",\"token\":%" PRId64 ",\"age\":%" PRId64 ",\"key\":%s}",
                      l->any ? "," : "", c->is_holder ? "true" : "false", quoted(c->owner, owner), quoted(c->host, host), c->pid, c->language,
                      c->token, c->age_ms, quoted(c->key, key));
    l->any = 1;
}

static void *serve(void *data) {
    request *r = data;
    char *what = text(r, "do"), *session_name = text(r, "session"), *mutex_name = text(r, "mutex"), *name = text(r, "name");
    char *key = text(r, "key"), *value = text(r, "value"), out[65536] = "";
    etcdlock_session *session = session_name ? find(sessions, session_name, NULL) : NULL;
    etcdlock_mutex *mutex = mutex_name ? find(mutexes, mutex_name, NULL) : NULL;
    int32_t status = ETCDLOCK_OK;
    if (!strcmp(what, "connect")) {
        etcdlock_options *options = etcdlock_options_new();
        struct { const char *name; int32_t (*set)(etcdlock_options *, int64_t); } times[] = {
            {"ttl", etcdlock_options_set_ttl_ms}, {"connect_timeout", etcdlock_options_set_connect_timeout_ms}, {"max_hold", etcdlock_options_set_max_hold_ms}};
        struct { const char *name; int32_t (*set)(etcdlock_options *, const char *); } texts[] = {
            {"namespace", etcdlock_options_set_namespace}, {"owner", etcdlock_options_set_owner}, {"user", etcdlock_options_set_user}, {"password", etcdlock_options_set_password}};
        for (int i = 0; i < 3 && !status; i++)
            if (member(r, times[i].name)) status = times[i].set(options, number(r, times[i].name, 0));
        for (int i = 0; i < 4 && !status; i++)
            if (member(r, texts[i].name)) status = texts[i].set(options, text(r, texts[i].name));
        if (!status && !(status = etcdlock_session_open(text(r, "target"), options, &session))) {
            find(sessions, session_name, session);
            sprintf(out, ",\"ttl\":%" PRId64 ",\"lease\":\"%" PRId64 "\"", etcdlock_session_ttl_ms(session), etcdlock_session_lease_id(session));
        }
        etcdlock_options_free(options);
    } else if (!strcmp(what, "mutex")) {
        if (!(status = etcdlock_mutex_new(session, name, &mutex))) find(mutexes, mutex_name, mutex);
    } else if (!strcmp(what, "try_lock")) {
        status = etcdlock_mutex_try_lock(mutex);
        granted(status, etcdlock_mutex_token(mutex), r);
        return NULL;
    } else if (!strcmp(what, "unlock")) status = etcdlock_mutex_unlock(mutex);
    else if (!strcmp(what, "state")) state(mutex, out);
    else if (!strcmp(what, "check")) status = etcdlock_mutex_check(mutex);
    else if (!strcmp(what, "put")) status = etcdlock_mutex_put(mutex, key, strlen(key), value, strlen(value));
    else if (!strcmp(what, "get")) {
        char buffer[4096] = "", quote[8192];
        int64_t length;
        if (!(status = etcdlock_mutex_get(mutex, key, strlen(key), buffer, sizeof buffer - 1, &length)))
            sprintf(out, ",\"value\":%s", length < 0 ? "null" : quoted(buffer, quote));
    } else if (!strcmp(what, "delete")) status = etcdlock_mutex_delete(mutex, key, strlen(key));
    else if (!strcmp(what, "inspect")) {
        list l = {out + sprintf(out, ",\"contenders\":["), 0};
        if (!(status = etcdlock_session_inspect(session, name, each, &l))) sprintf(l.end, "]");
    } else if (!strcmp(what, "stats")) {
        etcdlock_stats s;
        if (!(status = etcdlock_session_stats(session, &s, sizeof s)))
            sprintf(out, ",\"locks\":%" PRIu64 ",\"holds_lost\":%" PRIu64 ",\"leases_lost\":%" PRIu64 ",\"renewals\":%" PRIu64 ",\"requests\":%" PRIu64,
                    s.locks, s.holds_lost, s.leases_lost, s.renewals, s.requests);
    } else if (!strcmp(what, "close")) status = etcdlock_session_close(session, number(r, "timeout", 5000));
    answer(r, status, out);
    return NULL;
}

int main(void) {
    char *line = NULL;
    size_t room = 0;
    setvbuf(stdout, NULL, _IOLBF, 1 << 16);
    printf("{\"driver\":\"c\",\"version\":\"%s\",\"lacks\":\"\"}\n", etcdlock_version());
    /* Requests and listeners live until the process ends, which is soon. */
    for (int next = 0; getline(&line, &room, stdin) > 0;) {
        request *r = malloc(sizeof *r);
        *r = (request){strdup(line), 0, now()};
        r->id = number(r, "id", 0);
        char *what = text(r, "do");
        if (!strcmp(what, "lock")) {
            etcdlock_op *op = NULL;
            int32_t status = etcdlock_mutex_lock_start(find(mutexes, text(r, "mutex"), NULL), number(r, "timeout", -1), granted, r, &op);
            if (status) { answer(r, status, ""); continue; }
            etcdlock_op_free(locks[next].op);
            locks[next].id = r->id, locks[next].op = op, next = (next + 1) % 4096;
        } else if (!strcmp(what, "cancel")) {
            int64_t id = number(r, "op", 0);
            for (int i = 0; i < 4096; i++)
                if (locks[i].id == id) etcdlock_op_cancel(locks[i].op);
            answer(r, ETCDLOCK_OK, "");
        } else {
            pthread_t thread;
            if (pthread_create(&thread, NULL, serve, r)) abort();
            pthread_detach(thread);
        }
    }
    return 0;
}
