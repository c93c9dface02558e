#!/bin/sh
# The C programs with the release library under valgrind: memcheck.sh BUILD RIG CC [CXX]
#
# Any error in any process, and any block that nothing points to, fails it. Not counted: what is still in use
# when the process ends, as its threads are ("still reachable"), and blocks that are only pointed into
# ("possibly lost"), which are thread descriptors of glibc and hash tables of Rust.
set -eu
build=$1 rig=$2 cc=$3 cxx=${4:-}
if ! command -v valgrind > /dev/null; then
    echo "memcheck: skipped, valgrind is not installed"
    exit 0
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export ETCDLOCK_MEMCHECK=1
check="valgrind -q --log-file=$logs/%p.log --error-exitcode=9 --leak-check=full --num-callers=40
    --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect"
run() {
    echo "memcheck: $*"
    if ! "$@" || [ -n "$(find "$logs" -type f -size +0)" ]; then
        cat "$logs"/*.log
        exit 1
    fi
}
for program in "suite-$cc" ${cxx:+"cpp-$cxx-cpp"}; do
    run $check "$build/$program" memory:memcheck
    run "$rig" $check "$build/$program"
done
run $check "$build/sequence-$cc" 30000
run "$rig" $check "$build/soak-$cc" "" 200 20 5
