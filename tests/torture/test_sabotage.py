"""A checker that never failed proves nothing: clients with one protection taken out, against a real cluster, in a few lines each.

Each scene is played by the client that ships and by the broken one. The checker must be content with the first and catch the second. A scene
is a matter of moments, which a busy machine may miss, and then the broken client did nothing wrong: so it is played again, a few times. (The sixth break, an answer after the deadline that revives a lease, needs virtual time: core's simulation catches it.)

    python3 tests/torture/test_sabotage.py
"""

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/suite"))

import checker
from driving import Driver, Mutex, Refused, Session, now, until
from languages import shell
from torture import GO_PEER, PREFIX, Cluster, Hands, Log, Observer

NORMAL = str(ROOT / "target/release/examples/driver")
BROKEN = str(ROOT / "target/sabotage/driver")


class Missed(Exception):
    """The machine was too slow for the scene."""


class Scene:
    """Two clients, `a` behind the proxies and possibly broken, `b` beside them and whole; everybody writes a log."""

    def __init__(self, cluster: Cluster, hands: Hands, sabotage: str | None) -> None:
        self.cluster, self.hands, self.sabotage = cluster, hands, sabotage
        self.name = f"{PREFIX}scene-{time.monotonic_ns()}"
        self.logs: dict[str, Log] = {}

    async def __aenter__(self) -> "Scene":
        self.folder = Path(tempfile.mkdtemp(prefix="etcdlock-scene-"))
        self.observer = Observer()
        observed = self.logs["observer"] = Log(self.folder / "observer.jsonl")
        await self.observer.start(self.hands.endpoints, observed)
        self.faults = self.logs["faults"] = Log(self.folder / "faults.jsonl")
        self.a = await self.driver("a", BROKEN, {"ETCDLOCK_SABOTAGE": self.sabotage or ""})
        self.b = await self.driver("b", NORMAL, {})
        return self

    async def driver(self, id: str, program: str, env: dict) -> Driver:
        log = self.logs[id] = Log(self.folder / f"worker-{id}.jsonl")
        log.write(what="start", language="rust", at=now())
        driver = await Driver.start("rust", [program], env=env)
        driver.listener = lambda what, line: log.write(what=what, **line)
        return driver

    async def open(self, driver: Driver, ttl: int = 15_000) -> tuple[Session, Mutex]:
        target = ",".join(self.cluster.status["endpoints"] if driver is self.a else self.cluster.status["direct"])
        session = await driver.connect(target, ttl=ttl)
        return session, await session.mutex(self.name)

    async def queued(self, count: int) -> None:
        async def look():
            return len(self.observer.queue(self.name)) == count

        await until(f"{count} in the queue", look)

    async def believe(self, mutex: Mutex, seconds: float) -> None:
        """Asks it again and again whether it is held, which is what the checker goes by."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await mutex.state()
            await asyncio.sleep(0.01)

    async def take_away(self, kind: str, act) -> None:
        key = self.observer.queue(self.name)[0]
        began = now()
        await act(key)
        self.faults.write(kind=kind, **{"from": began}, to=now(), name=self.name, token=key["created"], key=key["key"], lease=int(key["lease"]))

    async def __aexit__(self, *failed) -> None:
        await self.cluster.do("heal")
        for id, driver in (("a", self.a), ("b", self.b)):
            await driver.end()
            self.logs[id].write(what="ended", code=driver.process.returncode, at=now())
        await self.observer.end()
        for log in self.logs.values():
            log.file.close()
        self.verdict = checker.check(checker.History.load(self.folder))
        shutil.rmtree(self.folder)


async def deadline_from_receipt(scene: Scene) -> None:
    # One member, because a client with others to ask waits less long for an answer.
    target = scene.cluster.status["endpoints"][0]
    await scene.cluster.do("fault", member=0, on="clients", direction="to_client", kind="delay", ms=1500)
    session = await scene.a.connect(target, ttl=4000)
    await scene.cluster.do("heal")
    mutex = await session.mutex(scene.name)
    await mutex.lock()
    _, next = await scene.open(scene.b)
    waiting = next.lock()
    await scene.queued(2)
    await scene.cluster.do("fault", member=0, on="clients", kind="cut")
    believing = asyncio.create_task(scene.believe(mutex, 6))
    await waiting
    await scene.believe(next, 1.5)
    await believing


async def unlock_by_name(scene: Scene) -> None:
    session, mutex = await scene.open(scene.a)
    await mutex.lock()
    _, next = await scene.open(scene.b)
    waiting = next.lock()
    await scene.queued(2)
    # Which member it talks to: the one that it waits for.
    for member in range(3):
        await scene.cluster.do("fault", member=member, on="clients", direction="to_server", kind="delay", ms=300)
        start = time.monotonic()
        await mutex.put(f"{scene.name}.probe", "x")
        slow = time.monotonic() - start > 0.25
        await scene.cluster.do("heal")
        if slow:
            break
    else:
        raise Missed("it talks to no member")
    # A copy of the unlock arrives late, when the client has long sent it to another member and holds the lock again.
    await scene.cluster.do("fault", member=member, on="clients", direction="to_server", kind="delay", ms=2500)
    sent = time.monotonic()
    await mutex.unlock()
    await waiting
    again = mutex.lock()
    await scene.queued(2)
    await next.unlock()
    await again
    if time.monotonic() - sent > 2.4:
        raise Missed("the lock was not held again when the copy arrived")
    waiting = next.lock()
    await scene.believe(mutex, 3.5 - (time.monotonic() - sent))
    try:
        await mutex.unlock()
    except Refused:
        pass
    await waiting
    await next.unlock()


async def no_own_key_watch(scene: Scene) -> None:
    _, mutex = await scene.open(scene.a)
    await mutex.lock()
    _, next = await scene.open(scene.b)
    waiting = next.lock()
    await scene.queued(2)
    await scene.believe(mutex, 0.3)
    await scene.take_away("key delete", lambda key: scene.hands.delete(key["key"]))
    await waiting
    await asyncio.gather(scene.believe(mutex, 1.5), scene.believe(next, 1.5))


async def no_in_process_queue(scene: Scene) -> None:
    session, mutex = await scene.open(scene.a)
    await mutex.lock()
    other = await session.mutex(scene.name)
    waiting = other.lock()
    await scene.believe(mutex, 0.3)
    if waiting.done():
        await scene.believe(other, 0.1)
    await mutex.unlock()
    await waiting


async def hand_over_skips_order(scene: Scene) -> None:
    session, mutex = await scene.open(scene.a)
    await mutex.lock()
    _, next = await scene.open(scene.b)
    waiting = next.lock()
    await scene.queued(2)
    other = await session.mutex(scene.name)
    last = other.lock()
    await mutex.check()
    await mutex.unlock()
    await waiting
    await asyncio.gather(scene.believe(next, 0.3), scene.believe(other, 0.3))
    await next.unlock()
    await last
    await other.unlock()


# What each break shows itself as: one of these at least. Which of them depends on who is first.
SCENES = {
    deadline_from_receipt: {"overlap", "late"},
    unlock_by_name: {"foreign"},
    no_own_key_watch: {"notice"},
    no_in_process_queue: {"overlap"},
    hand_over_skips_order: {"overlap", "tokens"},
}


async def run() -> int:
    cluster = Cluster()
    status = await cluster.start()
    hands = Hands(status["direct"])
    failures = 0
    for play, expected in SCENES.items():
        name = play.__name__.replace("_", "-")
        for sabotage, attempts in ((None, 1), (name, 5)):
            for attempt in range(1, attempts + 1):
                start = time.monotonic()
                missed = None
                async with Scene(cluster, hands, sabotage) as scene:
                    try:
                        await asyncio.wait_for(play(scene), 60)
                    except Missed as why:
                        missed = why
                found = {rule for rule, _ in scene.verdict.violations}
                right = bool(expected & found) if sabotage else not found
                what = "broken" if sabotage else "whole "
                seen = ", ".join(sorted(found)) or (f"the moment was missed: {missed}" if missed else "no violation")
                print(f"  {'ok  ' if right else 'FAILED' if attempt == attempts else 'again'} {name}, {what}: {seen} ({time.monotonic() - start:.1f} s)")
                if right:
                    break
            failures += not right
            if not right:
                for rule, text in scene.verdict.violations:
                    print(f"       {rule}: {text}")
    await cluster.end()
    return failures


def main() -> None:
    if not shutil.which("go"):
        print("sabotage: skipped: go is not installed, and the observer is written in it")
        return
    # The same file name as the whole client's, so it is copied away, and cargo puts the whole one back.
    shell(
        "cargo build --release --locked --quiet -p etcdlock --example driver --features etcdlock/sabotage && mkdir -p target/sabotage && "
        "cp -f target/release/examples/driver target/sabotage/driver.new && mv target/sabotage/driver.new target/sabotage/driver && "
        "cargo build --release --locked --quiet -p etcdlock --example driver"
    )
    shell(f"cd tests/peers/go && go build -o {GO_PEER} .")
    sys.stdout.reconfigure(line_buffering=True)
    raise SystemExit(asyncio.run(run()))


if __name__ == "__main__":
    main()
