#!/usr/bin/env bash
# Builds the clients to compare, and runs them in turns. QUICK=1 takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked --quiet -p etcdlock-bench -p etcdlock --bins --examples
if command -v go >/dev/null; then
    (cd tests/peers/go && go build -o ../../../target/release/examples/go-peer .)
fi
exec target/release/etcdlock-bench
