"""Drives the drivers: one Driver is one process of one language, with any number of calls in flight."""

import asyncio
import base64
import itertools
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

from languages import LANGUAGES, ROOT

# Fails a hang; nothing is meant to come near it.
HANG = 60.0


def now() -> int:
    """Nanoseconds of the clock that everybody here uses."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Refused(Exception):
    """A call ended with an error of the library."""

    def __init__(self, kind: str, message: str, answer: dict) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.answer = kind, message, answer


class Gone(Exception):
    """The driver's process ended before it answered."""


class Driver:
    """One process."""

    _numbers = itertools.count(1)

    def __init__(self, language: str, process: asyncio.subprocess.Process, hello: dict) -> None:
        self.language, self.process, self.hello = language, process, hello
        self.lacks = set(hello["lacks"].split())
        self.dead = False
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict]] = {}
        self._losses: dict[tuple[str, int], asyncio.Future[dict]] = {}
        self._names = itertools.count(1)
        # Called with each request, answer and event: for who keeps a record.
        self.listener = lambda what, line: None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, language: str, command: list[str] | None = None, stderr=None, env: dict | None = None) -> "Driver":
        offset = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        process = await asyncio.create_subprocess_exec(
            *(command or LANGUAGES[language].command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "DRIVER_BOOTTIME_OFFSET": str(offset), "PYTHONUNBUFFERED": "1", **(env or {})},
            limit=1 << 20,
        )
        hello = await asyncio.wait_for(process.stdout.readline(), HANG)
        if not hello:
            raise Gone(f"the {language} driver ended at once, with {await process.wait()}")
        return cls(language, process, json.loads(hello))

    async def _read(self) -> None:
        while line := await self.process.stdout.readline():
            answer = json.loads(line)
            self.listener("event" if "event" in answer else "answer", answer)
            if answer.get("event") == "lost":
                future = self._loss(answer["mutex"], answer["token"])
                if future.done():
                    raise AssertionError(f"lost twice: {answer}")
                future.set_result(answer)
            elif (future := self._answers.pop(answer["id"], None)) and not future.done():
                future.set_result(answer)
        self.dead = True
        for future in self._answers.values():
            if not future.done():
                future.set_exception(Gone(f"the {self.language} driver ended"))
                # Nobody may be waiting for it.
                future.exception()

    def _loss(self, mutex: str, token: int) -> asyncio.Future[dict]:
        key = (mutex, token)
        if key not in self._losses:
            self._losses[key] = asyncio.get_running_loop().create_future()
        return self._losses[key]

    def begin(self, do: str, **members) -> "Call":
        """Sends a request, and does not wait for its answer."""
        if self.dead:
            raise Gone(f"the {self.language} driver has ended")
        request = {"id": next(self._ids), "do": do, **{name: value for name, value in members.items() if value is not None}}
        answer = self._answers[request["id"]] = asyncio.get_running_loop().create_future()
        self.listener("request", {**request, "at": now()})
        # No spaces, and texts as they are: some drivers have a very small parser.
        self.process.stdin.write(json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return Call(self, request, answer)

    async def call(self, do: str, **members) -> dict:
        return await self.begin(do, **members)

    async def connect(self, target: str, **options) -> "Session":
        name = f"s{next(self._names)}"
        opened = await self.call("connect", session=name, target=target, **options)
        return Session(self, name, opened)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        # Its threads stop one after the other, and until the last has, it can still answer.
        end = time.monotonic() + 20
        while number == signal.SIGSTOP and not self._is_stopped():
            assert time.monotonic() < end, f"{self.language}: it does not stop"
            time.sleep(0.0005)

    def _is_stopped(self) -> bool:
        try:
            stats = [stat.read_text() for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat")]
        except FileNotFoundError:  # a thread that has just ended
            return False
        return all(stat.rpartition(")")[2].split()[0] in "TZX" for stat in stats)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reader

    async def end(self) -> None:
        """Closes its standard input and waits for its end."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), HANG)
        except asyncio.TimeoutError:
            await self.kill()
            raise AssertionError(f"the {self.language} driver did not end with its standard input") from None
        await self._reader


class Call:
    """A request in flight: await it for the answer, or cancel it."""

    def __init__(self, driver: Driver, request: dict, answer: asyncio.Future[dict]) -> None:
        self.driver, self.request, self.answer = driver, request, answer

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self, limit: float | None = HANG) -> dict:
        try:
            answer = await asyncio.wait_for(asyncio.shield(self.answer), limit)
        except asyncio.TimeoutError:
            raise AssertionError(f"{self.driver.language}: no answer within {limit} s to {self.request}") from None
        if "kind" in answer:
            raise Refused(answer["kind"], answer["message"], answer)
        return answer

    def within(self, limit: float | None):
        return self._wait(limit)

    def done(self) -> bool:
        return self.answer.done()

    async def cancel(self) -> None:
        await self.driver.call("cancel", op=self.request["id"])


class Session:
    def __init__(self, driver: Driver, name: str, opened: dict) -> None:
        self.driver, self.name, self.ttl, self.lease = driver, name, opened["ttl"], int(opened["lease"])

    async def mutex(self, name: str) -> "Mutex":
        label = f"m{next(self.driver._names)}"
        await self.driver.call("mutex", session=self.name, mutex=label, name=name)
        return Mutex(self.driver, label, name)

    async def inspect(self, name: str) -> list[dict]:
        return (await self.driver.call("inspect", session=self.name, name=name))["contenders"]

    async def stats(self) -> dict:
        return await self.driver.call("stats", session=self.name)

    async def close(self, timeout: int | None = None) -> dict:
        return await self.driver.call("close", session=self.name, timeout=timeout)


class Mutex:
    def __init__(self, driver: Driver, label: str, name: str) -> None:
        self.driver, self.label, self.name = driver, label, name

    def begin(self, do: str, **members) -> Call:
        return self.driver.begin(do, mutex=self.label, **members)

    def lock(self, timeout: int | None = None) -> Call:
        return self.begin("lock", timeout=timeout)

    def try_lock(self) -> Call:
        return self.begin("try_lock")

    def unlock(self) -> Call:
        return self.begin("unlock")

    def state(self) -> Call:
        return self.begin("state")

    def check(self) -> Call:
        return self.begin("check")

    def put(self, key: str, value: str) -> Call:
        return self.begin("put", key=key, value=value)

    def get(self, key: str) -> Call:
        return self.begin("get", key=key)

    def delete(self, key: str) -> Call:
        return self.begin("delete", key=key)

    async def lost(self, token: int, limit: float = HANG) -> dict:
        """Waits for the loss of the hold with this token."""
        return await asyncio.wait_for(asyncio.shield(self.driver._loss(self.label, token)), limit)


class Etcd:
    """A look at etcd, or a hand in it, from outside: over its JSON gateway."""

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = endpoint

    def ask(self, path: str, body: dict, timeout: float = 10.0) -> dict:
        url = f"http://{self.endpoint}/v3/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    async def asked(self, path: str, body: dict, timeout: float = 10.0) -> dict:
        return await asyncio.to_thread(self.ask, path, body, timeout)

    async def range(self, prefix: str) -> list[dict]:
        """Everything under a prefix, oldest first: key, value, created (its create revision), lease."""
        last = prefix.encode()
        body = {"key": encode(prefix), "range_end": encode(last[:-1] + bytes([last[-1] + 1])), "sort_target": "CREATE"}
        found = (await self.asked("kv/range", body)).get("kvs", [])
        return [
            {"key": decode(kv["key"]), "value": decode(kv.get("value", "")), "created": int(kv["create_revision"]), "lease": int(kv.get("lease", 0))}
            for kv in found
        ]

    async def keys(self, name: str) -> list[str]:
        return [kv["key"] for kv in await self.range(f"{name}/")]

    async def get(self, key: str) -> str | None:
        found = (await self.asked("kv/range", {"key": encode(key)})).get("kvs")
        return decode(found[0].get("value", "")) if found else None

    async def put(self, key: str, value: str) -> None:
        await self.asked("kv/put", {"key": encode(key), "value": encode(value)})

    async def delete(self, key: str) -> int:
        return int((await self.asked("kv/deleterange", {"key": encode(key)})).get("deleted", 0))

    async def revoke(self, lease: int) -> None:
        await self.asked("lease/revoke", {"ID": str(lease)})

    async def leases(self) -> list[int]:
        return [int(lease["ID"]) for lease in (await self.asked("lease/leases", {})).get("leases", [])]

    async def revision(self) -> int:
        return int((await self.asked("kv/range", {"key": encode("none")}))["header"]["revision"])

    async def compact(self, revision: int) -> None:
        await self.asked("kv/compaction", {"revision": str(revision)})


def encode(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def decode(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")


async def until(what: str, look, limit: float = HANG):
    """Looks again and again, for what only a look can tell."""
    end = time.monotonic() + limit
    while True:
        seen = await look()
        if seen:
            return seen
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {limit} s")
        await asyncio.sleep(0.01)


class Rig:
    """A throw-away etcd from tests/rig."""

    async def __aenter__(self) -> Etcd:
        self.process = await asyncio.create_subprocess_exec(
            str(ROOT / "target/release/etcdlock-rig"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return Etcd((await asyncio.wait_for(self.process.stdout.readline(), HANG)).decode().strip())

    async def __aexit__(self, *_) -> None:
        self.process.stdin.close()
        await self.process.wait()
