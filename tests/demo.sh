#!/usr/bin/env bash
# Builds the counter program of every language whose tools are here, and runs them on one counter.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "demo: building (the first time takes two minutes)"
cargo build --release --locked --quiet -p etcdlock-demo -p etcdlock --bins --examples
counters=("rust=target/release/examples/counter")

# A language joins in with a script that builds what it needs and prints its command.
for language in c cpp python node java kotlin ruby; do
    script="examples/$language/counter.sh"
    [ -x "$script" ] || continue
    if command=$("$script" 2>target/demo-$language.log); then
        counters+=("$language=$command")
    else
        echo "demo: without $language: $(tail -n 1 "target/demo-$language.log")"
    fi
done
exec target/release/etcdlock-demo "${counters[@]}"
