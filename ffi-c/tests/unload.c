/*
 * dlopen, lock, dlclose, twice, and then a moment in which the library's threads still run: unload LIBRARY
 * [TARGET]. Not linked with the library's functions: it finds each by name, as a plug-in host does.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <etcdlock.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void *library;

static void *find(const char *name) {
    void *symbol = dlsym(library, name);
    if (symbol == NULL) {
        fprintf(stderr, "unload: %s\n", dlerror());
        exit(1);
    }
    return symbol;
}

/* A function from a pointer, which ISO C does not convert. */
#define LOAD(function)                                                                                                \
    do {                                                                                                              \
        void *found_ = find("etcdlock_" #function);                                                                   \
        memcpy(&function, &found_, sizeof function);                                                                  \
    } while (0)

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "unload: not so: %s\n", #condition);                                                      \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

int main(int argc, char **argv) {
    if (argc < 2)
        return 64;
    const char *target = argc > 2 ? argv[2] : "";
    for (int round = 0; round < 2; round++) {
        int32_t (*session_open)(const char *, const etcdlock_options *, etcdlock_session **);
        int32_t (*mutex_new)(const etcdlock_session *, const char *, etcdlock_mutex **);
        int32_t (*mutex_lock)(etcdlock_mutex *, int64_t);
        int32_t (*mutex_unlock)(etcdlock_mutex *);
        library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (library == NULL)
            fprintf(stderr, "unload: %s\n", dlerror());
        CHECK(library != NULL);
        LOAD(session_open);
        LOAD(mutex_new);
        LOAD(mutex_lock);
        LOAD(mutex_unlock);
        etcdlock_session *session = NULL;
        etcdlock_mutex *mutex = NULL;
        CHECK(session_open(target, NULL, &session) == ETCDLOCK_OK);
        CHECK(mutex_new(session, "/c-test/unload", &mutex) == ETCDLOCK_OK);
        CHECK(mutex_lock(mutex, 20000) == ETCDLOCK_OK);
        CHECK(mutex_unlock(mutex) == ETCDLOCK_OK);
        CHECK(mutex_lock(mutex, 20000) == ETCDLOCK_OK);
        CHECK(mutex_unlock(mutex) == ETCDLOCK_OK);
        /* The session is left open: its lease is renewed by a thread inside the library. */
        CHECK(dlclose(library) == 0);
        usleep(100000);
    }
    /* Still in place, as it must be while its threads run. */
    library = dlopen(argv[1], RTLD_NOW | RTLD_NOLOAD);
    CHECK(library != NULL);
    printf("unload: dlopen, lock, dlclose, twice: fine\n");
    return 0;
}
