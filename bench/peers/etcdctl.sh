#!/bin/sh
# `etcdctl lock` as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS. Each round is a process, as it is used.
export ETCDCTL_API=3
echo ready
read -r _
i=0
while [ "$i" -lt "$4" ]; do
    start=$(date +%s%N)
    etcdctl --endpoints "$2" lock "$3" true || exit 1
    echo "enter 0 $(($(date +%s%N) - start))"
    i=$((i + 1))
done
