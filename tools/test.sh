#!/usr/bin/env bash
# The plans behind `make test`, `make test-long` and `make test-all`: test.sh short|long|all
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/steps.sh
export PATH="$PATH:$PWD/.venv/bin"
rust=(cargo test --release --locked)
core=("${rust[@]}" -p etcdlock)
languages=(-p etcdlock-ffi -p etcdlock-python -p etcdlock-node -p etcdlock-uniffi)

which=${1:-short}
short() {
    plan 60 "set-up: what is missing on this machine" tools/setup.sh test
    plan 110 "build: Rust, and the native part of every language" \
        cargo build --release --locked -p etcdlock-rig -p etcdlock-demo -p etcdlock-examples -p etcdlock-cli "${languages[@]}"
    plan 90 "build: Rust's tests" bash -c 'cargo test --release --locked --no-run -p etcdlock -p etcdlock-rig -p etcdlock-cli --lib --bins --tests
        cargo build --release --locked -p etcdlock --example peer --example driver --example counter'

    beside rust 20 "core: units, and behaviour in memory and on etcd" "${core[@]}" --lib --test behaviour --test events --test floors -- --skip simulation::
    beside rust 50 "core: on etcd" "${core[@]}" --test on_etcd
    beside rust 20 "core: 5,000 schedules in virtual time" \
        env ETCDLOCK_SCHEDULES=5000 "${core[@]}" --lib -- --nocapture --test-threads 1 simulation::tests
    beside rust 110 "core: faults of networks, members and clocks" "${core[@]}" --test faults --test leaks
    beside rust 30 "the rig, and the command" "${rust[@]}" -p etcdlock-rig -p etcdlock-cli

    beside languages 40 "C and C++" make --no-print-directory -C ffi-c test
    beside languages 45 "Node" make --no-print-directory -C bindings-node test
    beside languages 80 "Python" make --no-print-directory -C bindings-python test
    beside languages 120 "Java, Kotlin and Ruby" make --no-print-directory -C bindings-uniffi test
    plan 80 "one suite for every language and every pair" make --no-print-directory test-suite
}

# Until when; what takes as long as one likes takes what is left of it.
export TEST_UNTIL=${TEST_UNTIL:-$(($(date +%s) + 45 * 60))}
long() {
    plan 15 "the demo" tools/demo.sh
    plan 60 "the header of C, and its programs with valgrind, for long, and installed" make --no-print-directory -C ffi-c test-long
    plan 20 "core: 10,000 more schedules in virtual time" \
        env ETCDLOCK_FIRST_SEED=5000 ETCDLOCK_SCHEDULES=10000 "${core[@]}" --lib -- --nocapture --test-threads 1 simulation::tests::nothing
    plan 5 "torture: the checker catches each kind of violation" make --no-print-directory test-checker
    plan 90 "torture: clients with one protection taken out are caught" make --no-print-directory test-sabotage
    plan 80 "torture: faults for a minute or more" tools/for-what-is-left.sh 60 300 200 python3 tests/torture/torture.py --seconds {}
    plan 150 "core: on the newest etcd" tools/for-what-is-left.sh 100 100000 0 tests/versions.sh --quick
}
case $which in
    short) short && run_plan test ;;
    long) long && run_plan test-long ;;
    all) short && long && run_plan test-all ;;
esac
