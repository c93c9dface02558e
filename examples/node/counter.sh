#!/usr/bin/env bash
# Links the package beside the examples, without installing anything, and prints the command that runs the counter.
set -euo pipefail
cd "$(dirname "$0")/../.."
make --no-print-directory -C bindings-node build >&2
mkdir -p examples/node/node_modules
rm -rf examples/node/node_modules/etcdlock
ln -s ../../../bindings-node examples/node/node_modules/etcdlock
(cd examples/node && node --input-type=module -e 'import "etcdlock"') >&2
echo node examples/node/counter.mjs
