#!/usr/bin/env bash
# Builds the C counter and prints the command that runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v gcc >/dev/null || { echo "gcc is not installed" >&2; exit 1; }
make --no-print-directory -C ffi-c lib >&2
gcc -O2 -Iffi-c/include examples/c/counter.c -Ltarget/ffi-c -Wl,-rpath,"$PWD/target/ffi-c" -letcdlock -o target/ffi-c/demo-c
echo target/ffi-c/demo-c
