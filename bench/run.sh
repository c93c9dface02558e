#!/usr/bin/env bash
# Builds etcdlock and the others to compare, and runs them in turns. QUICK=1 is shorter; ONLY="64 processes" does only
# the work of that name. Whatever cannot be had on this machine is reported as missing.
set -euo pipefail
cd "$(dirname "$0")/.."
place=target/bench
mkdir -p $place
rm -f $place/has-*
say() { printf 'bench: %s\n' "$1"; }

say "etcdlock, and etcd's Lock RPC"
cargo build --release --locked --quiet -p etcdlock-bench -p etcdlock -p etcdlock-rig --bins --examples
if command -v go >/dev/null; then
    say "Go's concurrency.Mutex"
    (cd tests/peers/go && go build -o ../../../target/release/examples/go-peer .)
    # Debian's package of etcd's client is older, and is built without modules.
    debian=/usr/share/gocode
    if [ -d $debian/src/go.etcd.io/etcd/clientv3 ]; then
        GO111MODULE=off GOFLAGS='' GOPATH=$debian go build -o $place/go-debian bench/peers/go_debian.go ||
            say "Debian's own Go client cannot be built"
    else
        rm -f $place/go-debian
        say "Debian's own Go client is not there (apt-get install golang-etcd-server-dev)"
    fi
fi
if command -v gcc >/dev/null; then
    say "etcdlock for C"
    make --no-print-directory -s -C ffi-c lib >/dev/null
    library=$(dirname "$(find target -name libetcdlock.so | head -1)")
    gcc -O2 -Wall -Iffi-c/include -o $place/etcdlock-c bench/peers/etcdlock.c -L"$library" -letcdlock -Wl,-rpath,"$PWD/$library"
fi
if command -v python3 >/dev/null; then
    say "etcdlock for Python"
    make --no-print-directory -s -C bindings-python install >$place/python.log 2>&1 && touch $place/has-python
    say "python-etcd3"
    [ -e $place/python/has-etcd3 ] || {
        python3 -m venv $place/python && $place/python/bin/pip install --quiet --disable-pip-version-check etcd3 'protobuf<3.21' &&
            $place/python/bin/python -c 'import etcd3' && touch $place/python/has-etcd3
    } >>$place/python.log 2>&1 || say "python-etcd3 cannot be installed, see $place/python.log"
fi
if command -v node >/dev/null; then
    say "etcdlock for Node"
    make --no-print-directory -s -C bindings-node build >$place/node.log 2>&1 && touch $place/has-node
    say "etcd3 for Node"
    [ -d $place/node/node_modules/etcd3 ] || {
        mkdir -p $place/node && (cd $place/node && npm init -y && npm install --silent etcd3@1)
    } >>$place/node.log 2>&1 || say "etcd3 for Node cannot be installed, see $place/node.log"
fi
command -v etcdctl >/dev/null && touch $place/has-etcdctl
exec target/release/etcdlock-bench
