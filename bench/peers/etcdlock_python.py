"""etcdlock for Python as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS."""

import sys
import time

import etcdlock

what, endpoint, name, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with etcdlock.connect(endpoint, ttl=10) as session:
    mutex = session.mutex(name)
    hold = session.mutex(name + ".guard").lock() if what == "put" else None
    took = []
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(rounds):
        start = time.perf_counter_ns()
        if hold:
            hold.put(name, b"x")
        else:
            mutex.lock().unlock()
        took.append(time.perf_counter_ns() - start)
    print("\n".join(f"enter 0 {ns}" for ns in took), flush=True)
