#!/bin/sh
# The library exports what the header declares, and nothing else: exports.sh LIBRARY HEADER
set -eu
exported=$(nm -D --defined-only "$1" | awk '{print $3}' | sort)
declared=$(sed -n 's/^[a-z].*[ *]\(etcdlock_[a-z_]*\)(.*/\1/p' "$2" | sort)
if [ "$exported" != "$declared" ]; then
    echo "exported and declared differ:"
    echo "$exported" > /tmp/exported.$$; echo "$declared" | diff /tmp/exported.$$ - || true
    rm -f /tmp/exported.$$
    exit 1
fi
echo "exports: $(echo "$exported" | wc -l) functions, all declared in the header"
