#!/usr/bin/env bash
# for-what-is-left.sh LEAST MOST AFTERWARDS COMMAND…: runs COMMAND if LEAST seconds are left until $TEST_UNTIL (seconds since 1970)
# when AFTERWARDS seconds are kept for what follows; {} in it becomes their number, at most MOST.
set -euo pipefail
least=$1 most=$2 afterwards=$3
shift 3
left=$((${TEST_UNTIL:-0} - $(date +%s) - afterwards))
if [ $left -lt "$least" ]; then
    echo "skipped: $left s are left, and it takes $least"
    exit 0
fi
seconds=$((left > most ? most : left))
echo "$left s are left, it takes $seconds at most"
exec "${@//\{\}/$seconds}"
