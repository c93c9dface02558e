#!/usr/bin/env bash
# Uses what `make dist` has made as its users would, on a machine without compiler and checkout: use-packages.sh, in a folder with
# dist/ and examples/. Every package is installed in its language's own way, and all of them count together on one etcd. In
# dist/try is what a user's own build makes: the example in C, C++ and Java, and the jars that Maven would fetch.
set -euo pipefail
here=$PWD
work=$(mktemp -d)
children=()
trap 'kill "${children[@]}" 2>/dev/null || true; rm -rf "$work"' EXIT
say() { printf 'packages: %s\n' "$*"; }

for program in cargo gcc cc; do
    ! command -v $program >/dev/null || say "$program is here: this is not the machine of a user"
done
port=$((20000 + RANDOM % 10000))
etcd --data-dir "$work/etcd" --listen-client-urls "http://127.0.0.1:$port" --advertise-client-urls "http://127.0.0.1:$port" \
    --listen-peer-urls "http://127.0.0.1:$((port + 1))" --initial-advertise-peer-urls "http://127.0.0.1:$((port + 1))" \
    --initial-cluster "default=http://127.0.0.1:$((port + 1))" >"$work/etcd.log" 2>&1 &
children+=($!)
export ETCDLOCK_ENDPOINTS=127.0.0.1:$port
printf '%010d' 0 >"$work/count"
rounds=25 commands=()

say "the wheel, with pip, in an empty environment"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-index "$here"/dist/etcdlock-*.whl
commands+=("$work/venv/bin/python $here/examples/python/counter.py" "$work/venv/bin/python $here/examples/python/counter.py")

say "the npm packages, with npm, in an empty folder"
mkdir "$work/node"
cp examples/node/counter.mjs "$work/node/"
(cd "$work/node" && npm init -y >/dev/null && npm install --silent --no-audit --no-fund "$here"/dist/npm/*.tgz)
commands+=("node $work/node/counter.mjs")

say "the jar, on a class path"
commands+=("java -cp $(echo "$here"/dist/etcdlock-*.jar):$here/dist/try/java/*:$here/dist/try/java Counter")

say "the gem, with gem, in an empty folder"
# Its one dependency, ffi, is Debian's package here.
gem install --quiet --silent --local --ignore-dependencies --no-document --install-dir "$work/gems" "$here"/dist/etcdlock-*.gem
export GEM_PATH="$work/gems:$(gem environment gempath)"
commands+=("ruby -w $here/examples/ruby/counter.rb")

say "the C tree, unpacked"
mkdir "$work/c"
tar -C "$work/c" -xzf "$here"/dist/libetcdlock-*.tar.gz
for language in c cpp; do
    [ ! -e "dist/try/counter-$language" ] || commands+=("env LD_LIBRARY_PATH=$(echo "$work"/c/libetcdlock-*/lib) $here/dist/try/counter-$language")
done

say "the command"
export COUNT=$work/count
increment='n=$(cat "$COUNT"); printf %010d $((10#$n + 1)) >"$COUNT"'
"$here/dist/etcdlock" --version
for _ in 1 2; do
    (for _ in 1 2 3 4 5; do "$here/dist/etcdlock" run /demo/counter -- bash -c "$increment"; done) >"$work/command.log" 2>&1 &
    running+=($!)
done
for ((i = 0; i < ${#commands[@]}; i++)); do
    ${commands[i]} "$ETCDLOCK_ENDPOINTS" "$work/count" $rounds lock >"$work/steps-$i" 2>"$work/errors-$i" &
    running+=($!)
done
failed=
for ((i = 0; i < ${#running[@]}; i++)); do
    wait "${running[i]}" || { failed=yes; say "failed: ${commands[i - 2]:-the command}"; cat "$work/errors-$((i - 2))" "$work/command.log" 2>/dev/null || true; }
done
[ -z "$failed" ]
expected=$((10 + ${#commands[@]} * rounds)) found=$((10#$(cat "$work/count")))
[ $found = $expected ] || { say "$expected increments, $found found: updates were lost"; exit 1; }
cat "$work"/steps-* | sort -t = -k 3n | sed 's/token=\([0-9]*\).*/\1/' | sort -n -u -c || { say "tokens do not rise with the values"; exit 1; }
"$here/dist/etcdlock" list | tee "$work/list" | grep -q 'nothing is held' || { say "something is left:"; cat "$work/list"; exit 1; }
say "${#commands[@]} programs in six languages and the command counted to $found together: no update lost, tokens in order, nothing left"
