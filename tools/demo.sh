#!/usr/bin/env bash
# Builds the counter program of each language whose tools are here, and runs them on one counter, first without the lock and
# then with it. Rust always; C, C++, Python and Node where they can be built; Java, Kotlin and Ruby with LANGUAGES=all,
# or where they are built already.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS
say() { printf 'demo: %s\n' "$*"; }
have() { command -v "$1" >/dev/null 2>&1; }

parts=(-p etcdlock-demo -p etcdlock-examples) languages=()
if have gcc; then languages+=(c) parts+=(-p etcdlock-ffi); else say "without C: gcc is not installed"; fi
if have g++ && have gcc; then languages+=(cpp); else say "without C++: g++ is not installed"; fi
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    languages+=(python) parts+=(-p etcdlock-python)
else
    say "without Python: python3, 3.10 or later, is not installed"
fi
if node -e 'process.exit(process.versions.node.split(".")[0] < 18)' 2>/dev/null; then
    languages+=(node) parts+=(-p etcdlock-node)
else
    say "without Node: node, 18 or later, is not installed"
fi
for language in java kotlin ruby; do
    case $language in ruby) built=target/uniffi/gem/lib ;; *) built=target/uniffi/jvm/classes ;; esac
    if [ "${LANGUAGES:-}" = all ]; then
        languages+=("$language") parts+=(-p etcdlock-uniffi)
    elif [ -e "$built" ]; then
        languages+=("$language")
    fi
done
say "Rust ${languages[*]}; LANGUAGES=all adds what is not built yet of java, kotlin and ruby"

# One command, so that cargo has both cores busy; what fails in it fails again below, with its reason.
mkdir -p target
log=target/demo-build.log
build() { cargo build --release --locked --keep-going "$@"; }
if [ -t 2 ]; then
    build "${parts[@]}" || true
else
    total=$(cargo tree --locked --target all --prefix none --edges normal,build --no-dedupe "${parts[@]}" 2>/dev/null | sort -u | wc -l)
    build "${parts[@]}" >"$log" 2>&1 &
    cargo=$!
    said=$SECONDS
    while kill -0 $cargo 2>/dev/null; do
        sleep 1
        if [ $((SECONDS - said)) -ge 10 ]; then
            said=$SECONDS
            say "building: $(grep -c '^ *Compiling' "$log" || true) of at most $total crates, $((SECONDS - start)) s," \
                "now $(grep '^ *Compiling\|^ *Download' "$log" | tail -n 1 | sed 's/^ *[A-Za-z]* *//; s/ (.*//')"
        fi
    done
    wait $cargo || true
fi
build "${parts[@]:0:4}" || { say "Rust cannot be built"; exit 1; }
counters=("rust=target/release/counter")

# A language joins in with a script that builds what it needs and prints its command.
for language in "${languages[@]}"; do
    log=target/demo-$language.log
    if command=$("examples/$language/counter.sh" 2>"$log"); then
        counters+=("$language=$command")
    else
        say "without $language, which failed; the last lines of $log:"
        tail -n 8 "$log" | sed 's/^/    /'
    fi
done
say "built in $((SECONDS - start)) s"
exec target/release/etcdlock-demo "${counters[@]}"
