#!/bin/sh
# The C and C++ suites and the library, all built with AddressSanitizer: asan.sh ROOT
set -eu
root=$1
build=$root/target/asan
runtime=$(find "$(rustc +nightly --print sysroot 2> /dev/null || echo /nonexistent)" -name 'librustc*_rt.asan.a' 2> /dev/null | head -n 1)
if [ -z "$runtime" ]; then
    echo "asan: skipped, it needs a nightly toolchain"
    exit 0
fi
triple=$(rustc -vV | sed -n 's/^host: //p')
cd "$root"
# A target folder of its own, and --target, so that build scripts are built without the flag.
RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$build cargo +nightly rustc --release -p etcdlock-ffi --lib \
    --crate-type staticlib --target "$triple"
library=$build/$triple/release/libetcdlock_c.a
cat > "$build/canary.c" <<'END'
/* A key that is shorter than its length: the read is in the library. */
#include "check.h"
int main(void) {
    etcdlock_session *session = NULL;
    etcdlock_mutex *mutex = NULL;
    OK(etcdlock_session_open("memory:canary", NULL, &session));
    OK(etcdlock_mutex_new(session, "a", &mutex));
    OK(etcdlock_mutex_lock(mutex, -1));
    char *key = (char *)calloc(1, 10);
    etcdlock_mutex_put(mutex, key, 100, "v", 1);
    free(key);
    return 0;
}
END
for source in ffi-c/tests/suite.c ffi-c/tests/sequence.c ffi-c/tests/cpp.cpp target/asan/canary.c; do
    name=$(basename "${source%.*}")
    case $source in *.cpp) compile="g++ -std=c++17" ;; *) compile="gcc -std=c11" ;; esac
    $compile -g -O1 -fsanitize=address -Iffi-c/include -Iffi-c/tests -c "$source" -o "$build/$name.o"
    g++ "$build/$name.o" "$library" -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -rdynamic \
        -lgcc_s -lutil -lrt -lpthread -lm -ldl -o "$build/$name"
done
# What a forked child cannot reach is no leak; memcheck looks for leaks.
export ASAN_OPTIONS=detect_leaks=0:exitcode=9
status=0
"$build/canary" 2> "$build/canary.log" || status=$?
if [ $status != 9 ] || ! grep -q heap-buffer-overflow "$build/canary.log"; then
    echo "asan: the canary was not caught, so this would find nothing"
    exit 1
fi
for program in suite cpp; do
    "$build/$program" memory:asan
    "$root/target/release/etcdlock-rig" "$build/$program"
done
"$build/sequence" 300000
echo "asan: no error"
