"""The figures of the Python package: `make bench`. Each line says what it is, and the issue's aim."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path

import etcdlock

ROOT = Path(__file__).parent.parent
ENDPOINT = os.environ["ETCDLOCK_ENDPOINTS"]
ROUNDS = 2000


def say(what: str, figure: str) -> None:
    print(f"{what:<62} {figure}", flush=True)


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def import_time() -> None:
    code = "import time; t = time.perf_counter(); import etcdlock; print(time.perf_counter() - t)"
    took = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(11)]
    say("import etcdlock, median of 11 (aim: under 20 ms)", f"{statistics.median(took) * 1000:.1f} ms")


def wheel_size() -> None:
    (wheel,) = (ROOT / "target" / "wheels").glob("etcdlock-*.whl")
    say("wheel (aim: under 5 MB)", f"{wheel.stat().st_size / 1e6:.1f} MB")


def is_held() -> None:
    with etcdlock.connect(ENDPOINT) as session, session.mutex("/bench/held") as hold:
        call = min(timeit.repeat(hold.is_held, number=200_000, repeat=5)) / 200_000
    say("hold.is_held() (aim: under 150 ns)", f"{call * 1e9:.0f} ns")


def in_python(target: str, rounds: int) -> list[float]:
    with etcdlock.connect(target, ttl=10) as session:
        mutex = session.mutex("/bench/python")
        took = []
        for _ in range(rounds):
            start = time.perf_counter()
            mutex.lock().unlock()
            took.append((time.perf_counter() - start) * 1e6)
        return took


async def in_asyncio(rounds: int) -> list[float]:
    async with etcdlock.aio.connect(ENDPOINT, ttl=10) as session:
        mutex = session.mutex("/bench/asyncio")
        took = []
        for _ in range(rounds):
            start = time.perf_counter()
            await (await mutex.lock()).unlock()
            took.append((time.perf_counter() - start) * 1e6)
        return took


def in_rust(target: str, rounds: int) -> list[float]:
    peer = ROOT / "target" / "release" / "examples" / "peer"
    command = [str(peer), "rounds", target, "/bench/rust", str(rounds)]
    out = subprocess.run(command, input="go\n", capture_output=True, text=True, check=True).stdout
    return [int(line.split()[2]) / 1000 for line in out.splitlines() if line.startswith("enter")]


def round_trips() -> None:
    rust, python, tasks = [], [], []
    # In turns, because a shared machine is not equally fast all the time.
    for _ in range(5):
        rust += in_rust(ENDPOINT, ROUNDS // 5)
        python += in_python(ENDPOINT, ROUNDS // 5)
        tasks += asyncio.run(in_asyncio(ROUNDS // 5))
    base = statistics.median(rust)
    say(f"lock + unlock in Rust, median of {len(rust)}", f"{base:.0f} µs")
    for what, took in (("Python (aim: within 60 µs of Rust)", python), ("asyncio", tasks)):
        median = statistics.median(took)
        say(f"lock + unlock in {what}, median of {len(took)}", f"{median:.0f} µs, {median - base:+.0f}")


def the_binding_alone() -> None:
    rust, python = statistics.median(in_rust("memory:", ROUNDS)), statistics.median(in_python("memory:", ROUNDS))
    say("the same in memory, which is the binding alone", f"Rust {rust:.1f} µs, Python {python:.1f} µs, {python - rust:+.1f}")


def waiting_threads(count: int) -> None:
    with etcdlock.connect(ENDPOINT) as session:
        mutex = session.mutex("/bench/threads")
        holder, done = mutex.lock(), [0]

        def work() -> None:
            with mutex:
                done[0] += 1

        threads = [threading.Thread(target=work) for _ in range(count)]
        before = memory()
        for thread in threads:
            thread.start()
        time.sleep(1)
        grown = memory() - before
        start = time.perf_counter()
        holder.unlock()
        for thread in threads:
            thread.join()
        assert done[0] == count
        took = time.perf_counter() - start
    say(f"{count:,} threads wait for one name: memory for each", f"{grown / count / 1024:.1f} KiB; all served in {took:.1f} s")


async def waiting_tasks(count: int) -> None:
    async with etcdlock.aio.connect(ENDPOINT) as session:
        mutex, done = session.mutex("/bench/tasks"), [0]
        holder = await mutex.lock()

        async def work() -> None:
            async with mutex:
                done[0] += 1

        before = memory()
        tasks = [asyncio.create_task(work()) for _ in range(count)]
        await asyncio.sleep(2)
        grown = memory() - before
        start = time.perf_counter()
        await holder.unlock()
        await asyncio.gather(*tasks)
        assert done[0] == count
        took = time.perf_counter() - start
    say(f"{count:,} asyncio tasks wait for one name: memory for each", f"{grown / count / 1024:.1f} KiB; all served in {took:.1f} s")


if __name__ == "__main__":
    say("CPython", sys.version.split()[0])
    import_time()
    wheel_size()
    is_held()
    round_trips()
    the_binding_alone()
    waiting_threads(1000)
    asyncio.run(waiting_tasks(10_000))
