#!/usr/bin/env bash
# Installs the Python package into .venv and prints the command that runs the counter.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v python3 >/dev/null || { echo "python3 is not installed" >&2; exit 1; }
make --no-print-directory -C bindings-python install >&2
echo .venv/bin/python examples/python/counter.py
