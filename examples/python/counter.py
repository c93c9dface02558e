"""Counts in a file, with a lock around it or without: counter.py TARGET FILE ROUNDS lock|nolock"""

import contextlib
import sys
import time
from pathlib import Path

import etcdlock


def main(target: str, path: str, rounds: str, how: str) -> None:
    file = Path(path)
    with etcdlock.connect(target, ttl=10) as session:
        mutex = session.mutex("/demo/counter")
        for _ in range(int(rounds)):
            start = time.perf_counter()
            with mutex if how == "lock" else contextlib.nullcontext() as hold:
                waited = (time.perf_counter() - start) * 1e6
                value = int(file.read_text())
                time.sleep(0.0002)
                # In place and always ten digits: one step, so that a reader never finds half a number.
                with file.open("r+") as digits:
                    digits.write(f"{value + 1:010}")
                token = hold.token if hold else "-"
                print(f"token={token} value={value + 1} waited_us={waited:.0f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[4] not in ("lock", "nolock"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
