#!/usr/bin/env bash
# Compiles the Java example against the jar alone, in an empty folder, and has four processes count with it.
#
#     packed.sh JAR LIB
set -euo pipefail
cd "$(dirname "$0")"
jar=$(realpath "$1") lib=$(realpath "$2") example=$(realpath ../../examples/java/Counter.java)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cp "$jar" "$lib"/{jna,kotlin-stdlib}-[0-9]*.jar "$example" .
[ "$(jar tf etcdlock-*.jar linux-x86-64/libetcdlock_uniffi.so)" ]
javac -Xlint:all -Werror -cp '*' -d . Counter.java
printf '%010d' 0 > count
running=()
for n in 1 2 3 4; do
    java -cp '*:.' Counter "$ETCDLOCK_ENDPOINTS" count 25 lock > "steps-$n" & running+=($!)
done
for process in "${running[@]}"; do wait "$process"; done
sort -t = -k 3n steps-* > steps
[ "$(cat count)" = 0000000100 ] || { echo "updates were lost: $(cat count)"; exit 1; }
sed 's/token=\([0-9]*\).*/\1/' steps | sort -n -u -c || { echo "tokens do not rise with the values"; exit 1; }
echo "the jar works in an empty folder: 4 processes counted to 100, tokens in order"
