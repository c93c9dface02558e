#!/usr/bin/env bash
# Builds the jar and the example, and prints the command that runs the counter.
set -euo pipefail
cd "$(dirname "$0")/../.."
{ command -v javac && command -v mvn; } >/dev/null || { echo "a JDK and Maven are not installed" >&2; exit 1; }
make --no-print-directory -C bindings-uniffi jvm >&2
echo "java -XX:TieredStopAtLevel=1 -cp target/uniffi/jvm/test-classes:$(echo target/uniffi/jvm/etcdlock-*.jar):target/uniffi/lib/* CounterKt"
