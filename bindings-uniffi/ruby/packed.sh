#!/usr/bin/env bash
# Installs the gem into an empty folder and has four processes count with it.
#
#     packed.sh GEM
set -euo pipefail
cd "$(dirname "$0")"
gem=$(realpath "$1") example=$(realpath ../../examples/ruby/counter.rb)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cp "$example" .
# Its one dependency is here already; nothing is fetched.
gem install --quiet --silent --local --ignore-dependencies --no-document --install-dir gems "$gem"
export GEM_PATH="$folder/gems:$(gem environment gempath)"
ruby -e 'gem "etcdlock"; require "etcdlock"; exit $LOADED_FEATURES.grep(/etcdlock.rb$/).first.start_with?(ARGV[0])' "$folder"
printf '%010d' 0 > count
running=()
for n in 1 2 3 4; do
    ruby -w counter.rb "$ETCDLOCK_ENDPOINTS" count 25 lock > "steps-$n" & running+=($!)
done
for process in "${running[@]}"; do wait "$process"; done
sort -t = -k 3n steps-* > steps
[ "$(cat count)" = 0000000100 ] || { echo "updates were lost: $(cat count)"; exit 1; }
sed 's/token=\([0-9]*\).*/\1/' steps | sort -n -u -c || { echo "tokens do not rise with the values"; exit 1; }
echo "the gem works in an empty folder: 4 processes counted to 100, tokens in order"
