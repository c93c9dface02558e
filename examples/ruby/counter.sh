#!/usr/bin/env bash
# Makes the Ruby library ready and prints the command that runs the counter.
set -euo pipefail
cd "$(dirname "$0")/../.."
ruby -e 'require "ffi"' 2>/dev/null || { echo "Ruby, or its gem ffi, is not installed" >&2; exit 1; }
make --no-print-directory -C bindings-uniffi ruby >&2
echo ruby -I target/uniffi/gem/lib examples/ruby/counter.rb
