#!/usr/bin/env bash
# The plans behind `make test` and `make test-all`: test.sh [all]
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/steps.sh
export PATH="$PATH:$PWD/.venv/bin"
have() { command -v "$1" >/dev/null 2>&1; }
rust=(cargo test --release --locked)
core=("${rust[@]}" -p etcdlock)
# What core's tests run, and the examples that they start; the rest of core's examples is for other commands.
core_targets=(--lib --tests --example peer --example driver --example counter)
languages=(-p etcdlock-ffi -p etcdlock-python -p etcdlock-node -p etcdlock-uniffi)

plan 60 "set-up: what is missing on this machine" tools/setup.sh test
plan 110 "build: Rust, and the native part of every language" \
    cargo build --release --locked -p etcdlock-rig -p etcdlock-demo -p etcdlock-examples -p etcdlock-cli "${languages[@]}"
plan 90 "build: Rust's tests" "${rust[@]}" --no-run -p etcdlock -p etcdlock-rig -p etcdlock-cli "${core_targets[@]}" --bins

beside rust 20 "core: units, and behaviour in memory and on etcd" "${core[@]}" --lib --test behaviour --test events -- --skip simulation::
beside rust 50 "core: on etcd" "${core[@]}" --test on_etcd
beside rust 20 "core: 5,000 schedules in virtual time" \
    env ETCDLOCK_SCHEDULES=5000 "${core[@]}" --lib -- --nocapture --test-threads 1 simulation::tests
beside rust 110 "core: faults of networks, members and clocks" "${core[@]}" --test faults --test leaks
beside rust 30 "the rig, and the command" "${rust[@]}" -p etcdlock-rig -p etcdlock-cli

beside languages 40 "C and C++" make --no-print-directory -C ffi-c test
if have node && have npm; then
    beside languages 45 "Node" make --no-print-directory -C bindings-node test
else
    beside languages 1 "Node: not installed" echo "skipped: node and npm are not installed"
fi
if have python3 && python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    beside languages 80 "Python" make --no-print-directory -C bindings-python test
else
    beside languages 1 "Python: not installed" echo "skipped: python3, 3.10 or later, with venv, is not installed"
fi
beside languages 120 "Java, Kotlin and Ruby" make --no-print-directory -C bindings-uniffi test
if have python3; then
    plan 80 "one suite for every language and every pair" python3 tests/suite/run.py
fi

if [ "${1:-}" = all ]; then
    # Until when; what takes as long as one likes shares what is left of it.
    export TEST_UNTIL=${TEST_UNTIL:-$(($(date +%s) + 45 * 60))}
    plan 15 "the demo" bash -c "tools/demo.sh"
    plan 60 "the header of C, and its programs with valgrind, for long, and installed" make --no-print-directory -C ffi-c test-long
    plan 60 "packages of each language, as users install them" make --no-print-directory test-packed
    plan 20 "core: 10,000 more schedules in virtual time" \
        env ETCDLOCK_FIRST_SEED=5000 ETCDLOCK_SCHEDULES=10000 "${core[@]}" --lib -- --nocapture --test-threads 1 simulation::tests::nothing
    if have python3; then
        plan 5 "torture: the checker catches each kind of violation" bash -c 'cd tests/torture && python3 -m unittest -q test_checker'
        plan 90 "torture: clients with one protection taken out are caught" python3 tests/torture/test_sabotage.py
        plan 80 "torture: faults for a minute or more" tools/for-what-is-left.sh 60 300 python3 tests/torture/torture.py --seconds
    fi
    plan 120 "core: on the newest etcd" tests/versions.sh --quick
fi
run_plan "$([ "${1:-}" = all ] && echo test-all || echo test)"
