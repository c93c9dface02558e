#!/bin/sh
# The C suite and the library, both built with AddressSanitizer: asan.sh ROOT
set -eu
root=$1
build=$root/target/asan
if ! cargo +nightly --version > /dev/null 2>&1 || ! command -v clang > /dev/null; then
    echo "asan: skipped, it needs a nightly toolchain and clang"
    exit 0
fi
triple=$(rustc -vV | sed -n 's/^host: //p')
# A target folder of its own, and --target, so that build scripts are built without the flag.
cd "$root"
RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$build cargo +nightly rustc --release -p etcdlock-ffi --lib \
    --crate-type staticlib --target "$triple"
library=$build/$triple/release/libetcdlock_c.a
for test in suite sequence; do
    clang -std=c11 -g -O1 -fsanitize=address -I"$root/ffi-c/include" "$root/ffi-c/tests/$test.c" "$library" \
        -lgcc_s -lutil -lrt -lpthread -lm -ldl -o "$build/$test"
done
clang++ -std=c++17 -g -O1 -fsanitize=address -I"$root/ffi-c/include" "$root/ffi-c/tests/cpp.cpp" "$library" \
    -lgcc_s -lutil -lrt -lpthread -lm -ldl -o "$build/cpp"
# What a forked child cannot reach is no leak; memcheck looks for leaks.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=9
for program in suite cpp; do
    "$build/$program" memory:asan
    "$root/target/release/etcdlock-rig" "$build/$program"
done
"$build/sequence" 120000
echo "asan: no error"
