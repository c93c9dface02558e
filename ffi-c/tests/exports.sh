#!/bin/sh
# The library exports what the header declares, and nothing else; its soname has the major version; and dlclose()
# leaves it in place: exports.sh LIBRARY HEADER
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
readelf -d "$1" | grep -q 'SONAME.*\[libetcdlock\.so\.[0-9]*\]' || { echo "exports: the soname is wrong"; exit 1; }
readelf -d "$1" | grep -q 'FLAGS_1.*NODELETE' || { echo "exports: it is not linked with nodelete"; exit 1; }
