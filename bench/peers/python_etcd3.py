"""python-etcd3 as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS."""

import sys
import time

import etcd3

what, endpoint, name, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
host, port = endpoint.split(":")
client = etcd3.client(host=host, port=int(port))
lock = client.lock(name, ttl=10)
print("ready", flush=True)
sys.stdin.readline()
took = []
for _ in range(rounds):
    start = time.perf_counter_ns()
    if what == "put":
        client.put(name, "x")
    else:
        assert lock.acquire(timeout=None)
        lock.release()
    took.append(time.perf_counter_ns() - start)
print("\n".join(f"enter 0 {ns}" for ns in took), flush=True)
