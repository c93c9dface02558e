#!/usr/bin/env bash
# Puts the package together in a folder of its own, without installing anything, and prints the command that runs the counter.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --locked -p etcdlock-python >&2
package=target/demo-python/etcdlock
mkdir -p $package
cp bindings-python/python/etcdlock/* $package/ 2>/dev/null || true
cp target/release/libetcdlock_python.so $package/_native.abi3.so
PYTHONPATH=target/demo-python python3 -c 'import etcdlock' >&2
echo env PYTHONPATH=target/demo-python python3 examples/python/counter.py
