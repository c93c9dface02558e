#!/bin/sh
# Programs that know only the installed tree: by pkg-config and by CMake, C and C++, shared and static, in a clean
# folder and a clean environment: installed.sh ROOT
set -eu
root=$1
cc=$(command -v gcc || command -v clang)
cxx=$(command -v g++ || command -v clang++ || true)
[ -n "$cxx" ] || echo "installed: skipped for C++, no compiler for it is installed"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$root/examples/c/counter.c" "$root/examples/cpp/counter.cpp" "$work"

# Three ways to get a tree: into a prefix, by way of DESTDIR, and from the archive, moved.
make -s -C "$root/ffi-c" install-files PREFIX="$work/prefix" DESTDIR= > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
make -s -C "$root/ffi-c" install-files PREFIX=/usr LIBDIR=/usr/lib/multi/arch DESTDIR="$work/stage" >> "$work/log" 2>&1
make -s -C "$root/ffi-c" dist-files >> "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
archive=$(ls "$root"/dist/libetcdlock-*.tar.gz)
mkdir "$work/unpacked"
tar -C "$work/unpacked" -xzf "$archive"
mv "$work/unpacked"/libetcdlock-* "$work/moved"
size=$(stat -c %s "$work"/moved/lib/libetcdlock.so.0.*)
echo "installed: libetcdlock.so is $size bytes, the archive $(stat -c %s "$archive")"
[ "$size" -lt 6000000 ]

fails() { # COMMAND...; a plain `!` does not end a script
    if "$@"; then
        echo "installed: this must fail: $*"
        exit 1
    fi
}

names_etcdlock() { ldd "$1" | grep -q etcdlock; }

runs() { # PROGRAM LIBRARY-FOLDER
    echo 0000000000 > "$work/number"
    env -i LD_LIBRARY_PATH="$2" "$1" memory: "$work/number" 3 lock > "$work/out"
    [ "$(cat "$work/number")" = 0000000003 ] && grep -q '^token=[0-9]* value=3 waited_us=[0-9]*$' "$work/out"
}

if ! command -v pkg-config > /dev/null; then
    echo "installed: skipped, pkg-config is not installed"
    exit 0
fi
for tree in prefix:lib stage/usr:lib/multi/arch moved:lib; do
    prefix=$work/${tree%%:*} lib=$work/${tree%%:*}/${tree#*:}
    [ "$(readlink "$lib/libetcdlock.so")" = libetcdlock.so.0 ]
    case $(readlink "$lib/libetcdlock.so.0") in libetcdlock.so.0.*) ;; *) exit 1 ;; esac
    config() { env -i PATH="$PATH" PKG_CONFIG_PATH="$lib/pkgconfig" pkg-config "$@" etcdlock; }
    # A tree with the static library alone makes the linker take that.
    mkdir -p "$work/static"
    rm -rf "$work/static"/*
    cp -r "$prefix"/. "$work/static"
    rm "$work/static/${tree#*:}"/*.so*
    static_config() { env -i PATH="$PATH" PKG_CONFIG_PATH="$work/static/${tree#*:}/pkgconfig" pkg-config --static "$@" etcdlock; }

    cd "$work"
    "$cc" -std=c11 -Wall -Wextra -Wpedantic -Werror counter.c $(config --cflags --libs) -o c-shared
    [ -z "$cxx" ] || "$cxx" -std=c++17 -Wall -Wextra -Wpedantic -Werror counter.cpp $(config --cflags --libs) -o cpp-shared
    "$cc" -std=c11 counter.c $(static_config --cflags --libs) -o c-static
    [ -z "$cxx" ] || "$cxx" -std=c++17 counter.cpp $(static_config --cflags --libs) -o cpp-static
    for program in c ${cxx:+cpp}; do
        LD_LIBRARY_PATH="$lib" ldd "./$program-shared" | grep -q "libetcdlock.so.0 => $lib/libetcdlock.so.0"
        fails names_etcdlock "./$program-static"
        runs "./$program-shared" "$lib"
        runs "./$program-static" ""
    done
    echo "installed: pkg-config $(config --modversion), C and C++, shared and static, in ${tree%%:*}"
done

# Beside another Rust static library, which brings a copy of Rust's own functions, in both orders and each of them whole.
cat > other.rs << 'END'
#[unsafe(no_mangle)]
pub extern "C" fn other() -> i32 {
    std::panic::catch_unwind(|| (0..10).map(|n| n.to_string()).collect::<Vec<_>>().join(",").len() as i32).unwrap_or(-1)
}
END
cat > both.c << 'END'
#include <etcdlock.h>
#include <stdio.h>
int other(void);
int main(void) {
    etcdlock_session *session;
    int status = (int)etcdlock_session_open("memory:", NULL, &session);
    printf("%d %d\n", other(), status);
    return 0;
}
END
for kind in "" "-C lto=fat" "-C panic=abort"; do
    # shellcheck disable=SC2086
    rustc --edition 2024 -O $kind --crate-type staticlib other.rs -o libother.a
    for order in "-L. -lother @" "@ -L. -lother" "-Wl,--whole-archive @ -L. -lother -Wl,--no-whole-archive"; do
        # shellcheck disable=SC2046,SC2086
        "$cc" both.c $(static_config --cflags) $(echo "$order" | sed "s|@|$work/static/lib/libetcdlock.a|") $(static_config --libs-only-other) \
            -lgcc_s -lutil -lrt -lpthread -lm -ldl -o both
        [ "$(./both)" = "19 0" ]
    done
done
[ -z "$(nm -g --defined-only "$work/static/lib/libetcdlock.a" | grep -v ':$' | sed 's/.* //' | grep -v '^etcdlock_')" ]
echo "installed: beside another Rust static library"

if ! command -v cmake > /dev/null || [ -z "$cxx" ]; then
    echo "installed: the CMake package is skipped, CMake or a C++ compiler is not installed"
    exit 0
fi
mkdir "$work/cmake"
cat > "$work/cmake/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.16)
project(counter C CXX)
set(CMAKE_CXX_STANDARD 17)
find_package(etcdlock 0.1 REQUIRED)
add_executable(c-shared ../counter.c)
target_link_libraries(c-shared etcdlock::etcdlock)
add_executable(c-static ../counter.c)
target_link_libraries(c-static etcdlock::etcdlock_static)
add_executable(cpp-shared ../counter.cpp)
target_link_libraries(cpp-shared etcdlock::etcdlock)
add_executable(cpp-static ../counter.cpp)
target_link_libraries(cpp-static etcdlock::etcdlock_static)
END
for prefix in "$work/prefix" "$work/moved"; do
    rm -rf "$work/cmake/build"
    env -i PATH="$PATH" cmake -S "$work/cmake" -B "$work/cmake/build" -DCMAKE_PREFIX_PATH="$prefix" > "$work/log" 2>&1 &&
        env -i PATH="$PATH" cmake --build "$work/cmake/build" >> "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    for program in c cpp; do
        ldd "$work/cmake/build/$program-shared" | grep -q "libetcdlock.so.0 => $prefix"
        fails names_etcdlock "$work/cmake/build/$program-static"
        runs "$work/cmake/build/$program-shared" ""
        runs "$work/cmake/build/$program-static" ""
    done
    echo "installed: CMake, C and C++, shared and static, in $(basename "$prefix")"
done
# A version that does not fit is refused.
for wanted in 0.2 1.0 0.0; do
    sed -i "s/find_package(etcdlock [0-9.]* REQUIRED)/find_package(etcdlock $wanted REQUIRED)/" "$work/cmake/CMakeLists.txt"
    rm -rf "$work/cmake/build"
    fails env -i PATH="$PATH" cmake -S "$work/cmake" -B "$work/cmake/build" -DCMAKE_PREFIX_PATH="$work/prefix" > "$work/log" 2>&1
    grep -q 'compatible with requested' "$work/log"
done
echo "installed: CMake refuses versions that do not fit"
