#!/usr/bin/env bash
# Installs the npm package beside the examples and prints the command that runs the counter.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v npm >/dev/null || { echo "node and npm are not installed" >&2; exit 1; }
make --no-print-directory -C bindings-node examples >&2
echo node examples/node/counter.mjs
