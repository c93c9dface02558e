#!/usr/bin/env bash
# Runs core's tests on several releases of etcd: the one that is installed, and the newest 3.5, 3.6 and 3.7, built from
# Go's module proxy into a cache outside the tree, once.
#
#   tests/versions.sh            all of them: on_etcd, faults and behaviour
#   tests/versions.sh 3.6 3.7    only these
#   tests/versions.sh --quick    the newest, and on_etcd alone: for `make test-all`
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'versions: %s\n' "$*"; }
skip() { say "SKIPPED: $*"; }

module=go.etcd.io/etcd/server/v3
cache=${XDG_CACHE_HOME:-$HOME/.cache}/etcdlock
tests=(--test on_etcd --test faults --test behaviour)
lines=(installed 3.5 3.6 3.7)
case ${1-} in
--quick) tests=(--test on_etcd) lines=(3.7) ;;
?*) lines=("$@") ;;
esac

# The newest release of a line that the proxy knows; else the newest that was built before.
newest() {
    local known
    known=$(cd / && GOFLAGS=-mod=mod timeout 60 go list -m -versions "$module" 2>/dev/null | tr ' ' '\n' || true)
    [ -n "$known" ] || known=$(cd "$cache" 2>/dev/null && printf '%s\n' etcd-v* | sed 's/^etcd-//')
    grep -E "^v${1//./\\.}\.[0-9]+$" <<<"$known" | sort -V | tail -n 1
}

# etcd of a version, in the cache.
build() {
    local version=$1 folder=$cache/etcd-$1 work
    [ -x "$folder/etcd" ] && return
    say "building etcd $version"
    mkdir -p "$cache"
    # In a folder of its own, and moved when it is whole: others may build at the same time. A module of ours that requires
    # etcd's, because `go install` does not take one with replace directives.
    work=$(mktemp -d "$cache/build-XXXXXX")
    printf 'package main\n\nimport (\n\t"os"\n\n\t"%s/etcdmain"\n)\n\nfunc main() { etcdmain.Main(os.Args) }\n' "$module" >"$work/main.go"
    if (cd "$work" && go mod init etcdlock.test/etcd && go get "$module@$version" && go mod tidy && go build -trimpath -o etcd .) \
        >"$work/log" 2>&1; then
        mv -T "$work" "$folder" 2>/dev/null || rm -rf "$work"
    else
        tail -n 5 "$work/log"
        rm -rf "$work"
        return 1
    fi
}

cargo build --release --locked --quiet -p etcdlock --example peer --example counter
failed=()
for line in "${lines[@]}"; do
    if [ "$line" = installed ]; then
        etcd=${ETCD_BIN:-$(command -v etcd || echo .venv/bin/etcd)}
    else
        if ! command -v go >/dev/null; then
            skip "etcd $line: Go is not installed, so it cannot be built"
            continue
        fi
        version=$(newest "$line")
        if [ -z "$version" ]; then
            skip "etcd $line: the module proxy does not answer, and none was built before"
            continue
        fi
        if ! build "$version"; then
            skip "etcd $version cannot be built with $(go version | cut -d' ' -f3)"
            continue
        fi
        etcd=$cache/etcd-$version/etcd
    fi
    start=$SECONDS
    say "$("$etcd" --version | head -n 1): cargo test ${tests[*]}"
    if ETCD_BIN=$etcd cargo test --release --locked --quiet --no-fail-fast -p etcdlock "${tests[@]}"; then
        say "passed on $("$etcd" --version | head -n 1) in $((SECONDS - start))s"
    else
        failed+=("$line")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED on ${failed[*]}"
    exit 1
fi
