#!/usr/bin/env bash
# Builds the C++ counter and prints the command that runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v g++ >/dev/null || { echo "g++ is not installed" >&2; exit 1; }
make --no-print-directory -C ffi-c lib >&2
g++ -std=c++17 -O2 -Iffi-c/include examples/cpp/counter.cpp -Ltarget/ffi-c -Wl,-rpath,"$PWD/target/ffi-c" -letcdlock -o target/ffi-c/demo-cpp
echo target/ffi-c/demo-cpp
