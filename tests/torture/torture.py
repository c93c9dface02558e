"""Workers in every language, and etcd's own clients, take turns under faults; then a checker reads what all of them wrote down.

    make torture SECONDS=300 [SEED=n]        (or: python3 tests/torture/torture.py --seconds 300 --seed n)

Everything goes to target/torture/: the logs, torture-report.md, torture-report.svg. Ends with 1 if a rule was broken (see checker.py).
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/suite"))

import checker
import report
from driving import Driver, Etcd, Gone, Refused, now
from languages import LANGUAGES, shell

GO_PEER = str(ROOT / "target/release/examples/go-peer")
PREFIX = "/torture/"
# Ours use all of them. One is enough for the peers: a Go client that sits behind a cut connection keeps the whole queue waiting.
NAMES = [f"{PREFIX}a", f"{PREFIX}b", f"{PREFIX}b/nested", f"{PREFIX}c"]
PEER_NAMES = [f"{PREFIX}c"]


class Log:
    """A file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1 << 16)

    def write(self, **line) -> None:
        self.file.write(json.dumps(line) + "\n")


class Cluster:
    """Three members behind proxies: `etcdlock-rig cluster`."""

    async def start(self) -> dict:
        self.process = await asyncio.create_subprocess_exec(
            str(ROOT / "target/release/etcdlock-rig"), "cluster", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self.one = asyncio.Lock()
        self.status = json.loads(await self.process.stdout.readline())
        return self.status

    async def do(self, what: str, **members) -> dict:
        async with self.one:
            self.process.stdin.write(json.dumps({"do": what, **members}).encode() + b"\n")
            answer = await self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the rig ended at {what}")
        return json.loads(answer)

    async def end(self) -> None:
        self.process.stdin.close()
        await self.process.wait()


class Hands(Etcd):
    """A hand in etcd, at whichever member answers."""

    def __init__(self, endpoints: list[str]) -> None:
        self.endpoints = endpoints

    def ask(self, path: str, body: dict, timeout: float = 2.0) -> dict:
        for endpoint in self.endpoints * 3:
            self.endpoint = endpoint
            try:
                return super().ask(path, body, timeout)
            except OSError as error:
                last = error
        raise last


class Observer:
    """Sees every change of every queue, with the revisions, and keeps the present state for who wants to break something."""

    async def start(self, endpoints: list[str], log: Log) -> None:
        self.alive: dict[str, dict] = {}
        self.process = await asyncio.create_subprocess_exec(
            GO_PEER, "observe", ",".join(endpoints), PREFIX, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20
        )
        ready = asyncio.Event()
        self.reader = asyncio.create_task(self._read(log, ready))
        await asyncio.wait_for(ready.wait(), 30)

    async def _read(self, log: Log, ready: asyncio.Event) -> None:
        while text := await self.process.stdout.readline():
            line = json.loads(text)
            log.write(**line)
            if line["type"] == "ready":
                ready.set()
            elif line["type"] == "gap":
                self.alive.clear()
            elif match := checker.CONTENDER.match(line["key"]):
                if line["type"] == "put":
                    self.alive[line["key"]] = {**line, "name": match[1]}
                else:
                    self.alive.pop(line["key"], None)

    def queue(self, name: str) -> list[dict]:
        return sorted((key for key in self.alive.values() if key["name"] == name), key=lambda key: key["created"])

    async def end(self) -> None:
        self.process.stdin.close()
        await self.process.wait()
        await self.reader


class Resource:
    """A table that refuses smaller tokens, and one that takes everything."""

    def __init__(self, path: Path, log: Log) -> None:
        self.db, self.log = sqlite3.connect(path, isolation_level=None), log
        self.db.execute("pragma journal_mode = memory")
        self.db.execute("pragma synchronous = off")
        for table in ("fenced", "unfenced"):
            self.db.execute(f"create table {table} (name text primary key, token integer, writer text)")

    def write(self, name: str, token: int, writer: str) -> None:
        add = "insert into {} values (?, ?, ?) on conflict (name) do update set token = excluded.token, writer = excluded.writer"
        unfenced = self.db.execute(add.format("unfenced"), (name, token, writer))
        fenced = self.db.execute(add.format("fenced") + " where excluded.token >= fenced.token", (name, token, writer))
        for table, cursor in (("unfenced", unfenced), ("fenced", fenced)):
            self.log.write(table=table, name=name, token=token, worker=writer, accepted=cursor.rowcount == 1, at=now())


class Torture:
    def __init__(self, options) -> None:
        self.options, self.folder = options, options.folder
        self.random = random.Random(options.seed)
        self.calm = asyncio.Event()
        self.acquired: Counter = Counter()
        self.starved: dict[str, str] = {}
        self.workers: list[Worker] = []
        self.cluster, self.observer = Cluster(), Observer()
        self.now_doing: dict[int, str] = {}
        # Who holds what, and since when: for the faults that look for a victim.
        self.holding: dict[tuple[str, int], tuple[str, float]] = {}

    def held_for(self, name: str, token: int) -> float:
        _, since = self.holding.get((name, token), ("", time.monotonic()))
        return time.monotonic() - since

    async def run(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self.faults = Log(self.folder / "faults.jsonl")
        self.resource = Resource(self.folder / "resource.sqlite", Log(self.folder / "writes.jsonl"))
        status = await self.cluster.start()
        self.target = ",".join(status["endpoints"])
        self.hands = Hands(status["direct"])
        observed = Log(self.folder / "observer.jsonl")
        await self.observer.start(status["direct"], observed)
        self.began = now()

        for language in self.options.languages:
            self.workers += [Worker(self, f"{language}-{n}", language, NAMES) for n in (1, 2)]
        if "go" in self.options.peers:
            self.workers += [Worker(self, f"go-{n}", "go", PEER_NAMES) for n in (1, 2)]
        if "etcdctl" in self.options.peers:
            self.workers.append(Etcdctl(self, "etcdctl-1", PEER_NAMES))
        running = [asyncio.create_task(worker.run(random.Random(f"{self.options.seed} {worker.id}"))) for worker in self.workers]
        progress = asyncio.create_task(self.progress())
        await asyncio.sleep(1)
        await Faults(self).run(self.options.seconds)
        print("torture: the faults have ended; everybody must get every lock now")
        self.faulted = now()
        self.calm.set()
        done, late = await asyncio.wait(running, timeout=150)
        for worker, task in zip(self.workers, running):
            if task in late:
                self.starved[worker.id] = f"not done 150 s after the faults: {worker.doing}"
                task.cancel()
                await worker.kill()
            elif error := task.exception():
                raise error
        progress.cancel()
        await self.finish(observed)
        await self.cluster.end()

    async def progress(self) -> None:
        start = time.monotonic()
        while True:
            await asyncio.sleep(5)
            counts = ", ".join(f"{language} {count}" for language, count in sorted(self.acquired.items()))
            print(f"torture: {time.monotonic() - start:4.0f} s: {self.acquired.total()} acquisitions ({counts}); now: {', '.join(self.now_doing.values()) or 'calm'}")

    async def finish(self, observed: Log) -> None:
        """What is left when all leases had their time."""
        end = time.monotonic() + 15
        while True:
            keys = [kv["key"] for kv in await self.hands.range(PREFIX) if not kv["key"].endswith(".guarded")]
            leases = await self.hands.leases()
            if not keys and not leases or time.monotonic() > end:
                break
            await asyncio.sleep(0.2)
        await self.observer.end()
        versions = await self.hands.asked("maintenance/status", {})
        (self.folder / "end.json").write_text(
            json.dumps({
                "keys": keys, "leases": leases, "starved": self.starved, "seed": self.options.seed, "seconds": self.options.seconds,
                "began": self.began, "faulted": self.faulted, "etcd": versions.get("version", "?"),
                "versions": {worker.language: worker.version for worker in self.workers},
            }, indent=1)
        )
        for log in (self.faults, self.resource.log, observed, *(worker.log for worker in self.workers)):
            log.file.close()


class Worker:
    """A program in some language, which is a driver of tests/suite: two tasks that share a session. It is started again when killed."""

    def __init__(self, torture: Torture, id: str, language: str, names: list[str]) -> None:
        self.torture, self.id, self.language, self.names = torture, id, language, names
        self.lives = itertools.count(1)
        self.version = "?"
        self.stopped = asyncio.Event()
        self.stopped.set()
        self.doing = ""
        self.driver: Driver | None = None
        self.command = [GO_PEER, "drive"] if language == "go" else None
        # Two mutexes of one Go session do not exclude each other; that is known, and not what is looked at here.
        self.tasks = 1 if language == "go" else 2
        self.log: Log = None

    async def run(self, rng: random.Random) -> None:
        while True:
            await self.start()
            clients = (self.client(random.Random(rng.random())) for _ in range(self.tasks))
            results = await asyncio.gather(*clients, return_exceptions=True)
            for error in results:
                if error and not isinstance(error, Gone):
                    raise error
            if not any(results):
                await self.end()
                return
            code = await self.driver.process.wait()
            self.log.write(what="ended", code=code, at=now())
            self.log.file.close()
            if self.torture.calm.is_set() and code >= 0:
                return

    async def start(self) -> None:
        life = next(self.lives)
        self.label = f"{self.id}" if life == 1 else f"{self.id}.{life}"
        self.log = Log(self.torture.folder / f"worker-{self.label}.jsonl")
        self.log.write(what="start", language=self.language, at=now())
        with (self.torture.folder / f"{self.label}.stderr").open("w") as stderr:
            self.driver = await Driver.start(self.language, self.command, stderr=stderr, env=self.torture.options.environment)
        self.version = self.driver.hello["version"]
        log = self.log
        self.driver.listener = lambda what, line: log.write(what=what, **line)
        self.opening: asyncio.Task | None = None

    async def kill(self) -> None:
        """By the rig."""
        self.log.write(what="killed", at=now())
        self.driver.process.kill()

    async def end(self) -> None:
        await self.driver.end()
        self.log.write(what="ended", code=self.driver.process.returncode, at=now())

    async def open(self) -> object:
        """The session of this process, opened by whichever task comes first."""
        while True:
            try:
                ttl = random.Random(self.label).choice([3000, 4000, 5000])
                name = f"s{next(self.driver._names)}"
                await self.driver.begin("connect", session=name, target=self.torture.target, ttl=ttl, owner=self.label).within(None)
                return name
            except Refused:
                await asyncio.sleep(0.1)

    async def session_name(self) -> str:
        if self.opening is None:
            self.opening = asyncio.create_task(self.open())
        return await asyncio.shield(self.opening)

    async def mutexes(self) -> dict[str, str]:
        session = await self.session_name()
        labels = {}
        for name in self.names:
            labels[name] = f"m{next(self.driver._names)}"
            await self.driver.begin("mutex", session=session, mutex=labels[name], name=name).within(None)
        return labels

    async def client(self, rng: random.Random) -> None:
        mutexes = await self.mutexes()
        while not self.torture.calm.is_set():
            # Go's session ends with its lease; ours goes on.
            if self.language == "go" and self.session_is_over:
                mutexes = await self.again()
            await self.round(rng, *rng.choice(list(mutexes.items())))
            await asyncio.sleep(rng.random() * 0.02)
        if self.language == "go" and self.session_is_over:
            mutexes = await self.again()
        for name, mutex in mutexes.items():
            self.doing = f"last lock of {name}"
            try:
                await self.driver.begin("lock", mutex=mutex, timeout=60_000).within(None)
                await self.driver.begin("unlock", mutex=mutex).within(None)
            except Refused as error:
                if self.language != "go":
                    self.torture.starved[f"{self.label} on {name}"] = str(error)
        self.doing = "closing"
        self.finished = getattr(self, "finished", 0) + 1
        if self.finished % self.tasks == 0:
            try:
                await self.driver.begin("close", session=await self.session_name(), timeout=10_000).within(None)
            except Refused as error:
                if self.language != "go":
                    self.torture.starved[f"{self.label} close"] = str(error)

    session_is_over = False

    async def again(self) -> dict[str, str]:
        if self.session_is_over:
            # Closed, or the key of a failed unlock stays in the queue for as long as the process lives.
            self.driver.begin("close", session=await self.session_name())
            self.session_is_over, self.opening = False, None
        return await self.mutexes()

    async def round(self, rng: random.Random, name: str, mutex: str) -> None:
        driver, chance = self.driver, rng.random()
        try:
            if chance < 0.15:
                call = driver.begin("try_lock", mutex=mutex)
            elif chance < 0.3 and "cancel" not in driver.lacks:
                call = driver.begin("lock", mutex=mutex)
                await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.1, 0.3]))
                await driver.begin("cancel", op=call.request["id"]).within(None)
            else:
                call = driver.begin("lock", mutex=mutex, timeout=rng.choice([20, 200, 2000, 20_000, 20_000]))
            got = await call.within(None)
        except Refused as error:
            if error.kind == "LOST" and self.language == "go":
                self.session_is_over = True
            if self.language == "go" and "lease not found" in error.message:
                self.session_is_over = True
            if error.kind != "CANCELLED":
                await asyncio.sleep(rng.random() * 0.05)
            return
        self.torture.acquired[self.language] += 1
        self.torture.holding[(name, got["token"])] = (self.id, time.monotonic())
        try:
            await self.hold(rng, name, mutex, got["token"])
        finally:
            self.torture.holding.pop((name, got["token"]), None)

    async def hold(self, rng: random.Random, name: str, mutex: str, token: int) -> None:
        driver = self.driver
        chance = rng.random()
        rest = rng.random() * (0.01 if chance < 0.8 else 0.25 if chance < 0.97 else 2.5)
        until, writes, held = time.monotonic() + rest, rng.random() < 0.3, True
        # Some writers look before they write; the others are why a resource should look at the token.
        careless = rng.random() < 0.6
        try:
            while True:
                held = (await driver.begin("state", mutex=mutex).within(None))["held"]
                left = until - time.monotonic()
                if not held or left <= 0:
                    break
                if writes:
                    self.torture.resource.write(name, token, self.label)
                    if "put" not in driver.lacks:
                        await driver.begin("put", mutex=mutex, key=f"{name}.guarded", value=str(token)).within(None)
                    writes = False
                await asyncio.sleep(min(0.02, left))
            if held or careless:
                self.torture.resource.write(name, token, self.label)
        except Refused:
            held = False
        if not held and self.language == "go":
            self.session_is_over = True
        try:
            await driver.begin("unlock", mutex=mutex).within(None)
        except Refused as error:
            if self.language == "go" and error.kind != "ok":
                self.session_is_over = True


class Etcdctl(Worker):
    """`etcdctl lock`, a process for each turn; told in the same words as the others."""

    def __init__(self, torture: Torture, id: str, names: list[str]) -> None:
        super().__init__(torture, id, "etcdctl", names)
        self.program = shutil.which(os.environ.get("ETCDCTL_BIN", "etcdctl")) or str(ROOT / ".venv/bin/etcdctl")

    async def run(self, rng: random.Random) -> None:
        self.label = self.id
        self.log = Log(self.torture.folder / f"worker-{self.id}.jsonl")
        self.log.write(what="start", language="etcdctl", at=now())
        self.version = (await self.output("version")).splitlines()[0].split()[-1]
        for name in self.names:
            self.log.write(what="request", id=0, do="mutex", session="", mutex=name, name=name)
            self.log.write(what="answer", id=0, **{"from": now()}, at=now())
        number = itertools.count(1)
        while not self.torture.calm.is_set():
            name = rng.choice(self.names)
            start = now()
            self.process = await asyncio.create_subprocess_exec(
                self.program, "--endpoints", self.torture.target, "lock", "--ttl", "5", name,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, "ETCDCTL_API": "3"},
            )
            try:
                key = (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode().strip()
                # The observer knows its revision, a moment later at the latest.
                for _ in range(100):
                    if key in self.torture.observer.alive:
                        break
                    await asyncio.sleep(0.005)
                seen = self.torture.observer.alive.get(key)
                if seen:
                    id, token = next(number), seen["created"]
                    self.torture.acquired["etcdctl"] += 1
                    self.log.write(what="request", id=id, do="lock", mutex=name, at=start)
                    self.log.write(what="answer", id=id, **{"from": start}, at=now(), held=self.process.returncode is None, token=token, seen=now())
                    await asyncio.sleep(rng.random() * 0.2)
                    if self.process.returncode is None:
                        id, start = next(number), now()
                        self.process.send_signal(signal.SIGINT)
                        self.log.write(what="request", id=id, do="unlock", mutex=name, at=start)
                        await asyncio.wait_for(self.process.wait(), 10)
                        self.log.write(what="answer", id=id, **{"from": start}, at=now())
            except asyncio.TimeoutError:
                pass
            if self.process.returncode is None:
                self.process.send_signal(signal.SIGINT)
                try:
                    await asyncio.wait_for(self.process.wait(), 5)
                except asyncio.TimeoutError:
                    self.process.kill()
                    await self.process.wait()
            await asyncio.sleep(rng.random() * 0.3)
        self.log.write(what="ended", code=0, at=now())

    async def output(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            self.program, *arguments, stdout=asyncio.subprocess.PIPE, env={**os.environ, "ETCDCTL_API": "3"}
        )
        return (await process.communicate())[0].decode()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


class Faults:
    """The schedule: each kind once, in an order that the seed decides, and again; later ones two at a time."""

    def __init__(self, torture: Torture) -> None:
        self.torture, self.cluster, self.random = torture, torture.cluster, torture.random
        self.kinds = {
            "member kill": self.member_kill,
            "member stop": self.member_stop,
            "member isolated": self.member_isolated,
            "member cut": self.member_cut,
            "answers dropped": self.answers_dropped,
            "delay": self.delay,
            "requests held": self.requests_held,
            "connections reset": self.connections_reset,
            "connections refused": self.connections_refused,
            "compaction": self.compaction,
            "leader move": self.leader_move,
            "rolling restart": self.rolling_restart,
            "blackout": self.blackout,
            "lease revoke": self.lease_revoke,
            "key delete": self.key_delete,
            "waiter's key delete": self.waiter_delete,
            "worker kill": self.worker_kill,
            "worker stop": self.worker_stop,
        }
        self.numbers = itertools.count()

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        bag: list[str] = []
        lap = 0
        while time.monotonic() < end:
            if not bag:
                bag, lap = list(self.kinds), lap + 1
                self.random.shuffle(bag)
            # The schedule is drawn before anything happens, so that it is the same for the same seed.
            together = [bag.pop() for _ in range(min(len(bag), 2 if lap > 1 and self.random.random() < 0.4 else 1))]
            seeds = [self.random.random() for _ in together]
            pause = self.random.uniform(0.3, 1.5)
            await asyncio.gather(*(self.one(kind, random.Random(seed)) for kind, seed in zip(together, seeds)))
            await asyncio.sleep(pause)
        await self.cluster.do("heal")

    async def one(self, kind: str, rng: random.Random) -> None:
        number = next(self.numbers)
        self.torture.now_doing[number] = kind
        try:
            await self.kinds[kind](kind, rng)
        finally:
            del self.torture.now_doing[number]

    async def lasting(self, kind: str, start, seconds: float, stop, **more) -> None:
        began = now()
        await start()
        await asyncio.sleep(seconds)
        await stop()
        self.torture.faults.write(kind=kind, **{"from": began}, to=now(), **more)

    async def proxied(self, title: str, rng: random.Random, members: list[int], seconds: float, **fault) -> None:
        async def start() -> None:
            for member in members:
                await self.cluster.do("fault", member=member, **fault)

        async def stop() -> None:
            for member in members:
                await self.cluster.do("heal", member=member)

        await self.lasting(title, start, seconds, stop, members=members)

    async def member_kill(self, kind, rng) -> None:
        member = rng.randrange(3)
        await self.lasting(
            kind,
            lambda: self.cluster.do("kill", member=member),
            rng.uniform(0.5, 4),
            lambda: self.start_again(member),
            members=[member],
        )

    async def start_again(self, member: int) -> None:
        """Until it answers, or for a while: it may be cut off by another fault, whose end must not wait for this."""
        await self.cluster.do("start", member=member)
        etcd, end = Etcd(self.cluster.status["direct"][member]), time.monotonic() + 10
        while time.monotonic() < end:
            try:
                await etcd.asked("kv/range", {"key": "bm9uZQ=="}, 1)
                return
            except OSError:
                await asyncio.sleep(0.1)

    async def member_stop(self, kind, rng) -> None:
        member = rng.randrange(3)
        await self.lasting(
            kind, lambda: self.cluster.do("stop", member=member), rng.uniform(0.5, 5), lambda: self.cluster.do("cont", member=member), members=[member]
        )

    async def member_isolated(self, kind, rng) -> None:
        member = rng.randrange(3)
        await self.lasting(
            kind, lambda: self.cluster.do("isolate", member=member), rng.uniform(1, 5), lambda: self.cluster.do("heal", member=member), members=[member]
        )

    async def member_cut(self, kind, rng) -> None:
        await self.proxied(kind, rng, [rng.randrange(3)], rng.uniform(0.5, 5), kind="cut")

    async def answers_dropped(self, kind, rng) -> None:
        members = rng.choice([[0], [1], [2], [0, 1, 2]])
        await self.proxied(kind, rng, members, rng.uniform(0.3, 2), direction="to_client", kind="cut")

    async def delay(self, kind, rng) -> None:
        await self.proxied(kind, rng, rng.choice([[0], [1], [2], [0, 1, 2]]), rng.uniform(1, 5), kind="delay", ms=rng.choice([20, 200, 700, 1500]))

    async def requests_held(self, kind, rng) -> None:
        members = rng.choice([[0], [1], [2], [0, 1, 2]])
        await self.proxied(kind, rng, members, rng.uniform(0.3, 3), direction=rng.choice(["to_server", "to_client"]), kind="hold")

    async def connections_reset(self, kind, rng) -> None:
        began = now()
        for _ in range(rng.randrange(2, 8)):
            await self.cluster.do("reset", member=rng.randrange(3))
            await self.cluster.do("reset_after", member=rng.randrange(3), direction=rng.choice(["to_server", "to_client"]), bytes=rng.randrange(1, 3000))
            await asyncio.sleep(rng.uniform(0, 0.4))
        self.torture.faults.write(kind=kind, **{"from": began}, to=now())
        await self.cluster.do("heal")

    async def connections_refused(self, kind, rng) -> None:
        member = rng.randrange(3)
        await self.lasting(
            kind, lambda: self.cluster.do("refuse", member=member), rng.uniform(0.5, 4), lambda: self.cluster.do("heal", member=member), members=[member]
        )

    async def compaction(self, kind, rng) -> None:
        began = now()
        for _ in range(3):
            await self.cluster.do("compact")
            await asyncio.sleep(rng.uniform(0, 0.3))
        self.torture.faults.write(kind=kind, **{"from": began}, to=now())

    async def leader_move(self, kind, rng) -> None:
        began = now()
        await self.cluster.do("move_leader")
        self.torture.faults.write(kind=kind, **{"from": began}, to=now())

    async def rolling_restart(self, kind, rng) -> None:
        began = now()
        for member in rng.sample(range(3), 3):
            await self.cluster.do("kill", member=member)
            await asyncio.sleep(rng.uniform(0, 0.5))
            await self.start_again(member)
        self.torture.faults.write(kind=kind, **{"from": began}, to=now())

    async def blackout(self, kind, rng) -> None:
        """No member can be reached, for less or more than a TTL."""
        await self.proxied(kind, rng, [0, 1, 2], rng.uniform(0.5, 8), kind=rng.choice(["cut", "hold"]))

    async def lease_revoke(self, kind, rng) -> None:
        # In a quiet time, so that the checker can ask for a quick notice.
        await asyncio.sleep(2)
        for _ in range(rng.randrange(1, 3)):
            if found := await self.somebody(rng, 0):
                await self.by_hand("lease revoke", found, self.torture.hands.revoke(int(found["lease"])))

    async def key_delete(self, kind, rng) -> None:
        await asyncio.sleep(2)
        for _ in range(rng.randrange(1, 3)):
            if found := await self.somebody(rng, 0):
                await self.by_hand("key delete", found, self.torture.hands.delete(found["key"]))

    async def waiter_delete(self, kind, rng) -> None:
        for _ in range(rng.randrange(1, 4)):
            if found := await self.somebody(rng, rng.randrange(1, 4)):
                await self.by_hand("key delete", found, self.torture.hands.delete(found["key"]))

    async def somebody(self, rng, place: int) -> dict | None:
        """Who stands at this place of some queue; a holder that has held for a while, or it would be gone before the blow falls."""
        for _ in range(400):
            name = rng.choice(NAMES)
            queue = self.torture.observer.queue(name)
            if len(queue) > place and (place or self.torture.held_for(name, queue[0]["created"]) > 0.1):
                return queue[place]
            await asyncio.sleep(0.01)
        return None

    async def by_hand(self, kind: str, found: dict, act) -> None:
        began = now()
        try:
            await act
        except OSError:
            # The lease or the key has gone meanwhile, or nobody answered: it may have happened.
            pass
        self.torture.faults.write(kind=kind, **{"from": began}, to=now(), name=found["name"], token=found["created"], key=found["key"], lease=int(found["lease"]))
        await asyncio.sleep(1.2)

    def victim(self, rng) -> Worker:
        """Mostly one that holds something."""
        all = [worker for worker in self.torture.workers if not isinstance(worker, Etcdctl)]
        holding = {who for who, _ in self.torture.holding.values()}
        return rng.choice([worker for worker in all if worker.id in holding] if holding and rng.random() < 0.7 else all)

    async def worker_kill(self, kind, rng) -> None:
        worker, began = self.victim(rng), now()
        label = worker.label
        await worker.kill()
        self.torture.faults.write(kind=kind, **{"from": began}, to=now(), worker=label)
        await asyncio.sleep(0.5)

    async def worker_stop(self, kind, rng) -> None:
        """Stopped for less or more than its TTL."""
        worker, began = self.victim(rng), now()
        label, process = worker.label, worker.driver.process
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(rng.choice([0.3, 2, 6, 8]))
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
        self.torture.faults.write(kind=kind, **{"from": began}, to=now(), worker=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=ROOT / "target/torture")
    parser.add_argument("--languages", default="")
    parser.add_argument("--no-build", action="store_true")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    options.seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    options.environment = {}
    options.peers = []
    chosen = [name for name in LANGUAGES if not options.languages or name in options.languages.split(",")]
    if not shutil.which("go"):
        print("torture: skipped: go is not installed, and the observer is written in it")
        return
    options.languages = []
    for name in chosen:
        if why := LANGUAGES[name].missing():
            print(f"torture: without {LANGUAGES[name].title}: {why}")
            continue
        options.languages.append(name)
        if not options.no_build:
            LANGUAGES[name].make()
    if not options.no_build:
        shell("cargo build --release --locked --quiet -p etcdlock-rig")
        shell(f"cd tests/peers/go && go build -o {GO_PEER} .")
    options.peers = ["go"] + (["etcdctl"] if shutil.which(os.environ.get("ETCDCTL_BIN", "etcdctl")) or (ROOT / ".venv/bin/etcdctl").exists() else [])
    print(f"torture: seed {options.seed}, {options.seconds:.0f} s of faults; {', '.join(options.languages)}; beside {', '.join(options.peers)}")
    asyncio.run(Torture(options).run())
    verdict = report.write(options.folder)
    print(f"torture: {sum(verdict.acquisitions.values())} acquisitions, {len(verdict.violations)} violations; {options.folder}/torture-report.md")
    if verdict.violations:
        for rule, text in verdict.violations[:20]:
            print(f"torture: VIOLATION: {rule}: {text}")
        print(f"torture: run it again: make torture SECONDS={options.seconds:.0f} SEED={options.seed}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
