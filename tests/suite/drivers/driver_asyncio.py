"""The suite's driver for asyncio: a task for each request. See ../README.md."""

import asyncio
import json
import os
import sys
import time
import traceback

import etcdlock
from etcdlock import aio

sessions, mutexes, holds, tasks = {}, {}, {}, {}
listeners = set()


def now():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def say(**line):
    print(json.dumps(line), flush=True)


def seconds(request, name):
    return None if name not in request else request[name] / 1000


def state(mutex):
    seen = now()
    return {"held": mutex.is_held(), "remaining": int(mutex.remaining() * 1000), "token": mutex.token or 0, "seen": seen}


async def listen(name, hold):
    reason = await hold.lost()
    say(event="lost", mutex=name, token=hold.token, reason=reason, at=now())


def granted(name, hold):
    holds[name] = hold
    listeners.add(asyncio.create_task(listen(name, hold)))
    return state(mutexes[name])


async def connect(r):
    given = {name: r[name] for name in ("namespace", "owner", "user", "password") if name in r}
    times = {name: seconds(r, name) for name in ("ttl", "connect_timeout", "max_hold")}
    session = sessions[r["session"]] = await aio.connect(r.get("target"), **given, **times)
    return {"ttl": int(session.ttl * 1000), "lease": str(session.lease_id or 0)}


async def mutex(r):
    mutexes[r["mutex"]] = sessions[r["session"]].mutex(r["name"])


async def lock(r):
    return granted(r["mutex"], await mutexes[r["mutex"]].lock(timeout=seconds(r, "timeout")))


async def try_lock(r):
    hold = await mutexes[r["mutex"]].try_lock()
    return granted(r["mutex"], hold) if hold else {"kind": "BUSY", "message": ""}


async def get(r):
    value = await holds[r["mutex"]].get(r["key"])
    return {"value": None if value is None else value.decode()}


async def inspect(r):
    return {"contenders": [
        {"holder": c.is_holder, "owner": c.owner, "host": c.host, "pid": c.pid, "language": c.language, "token": c.token,
         "age": -1 if c.age is None else int(c.age * 1000), "key": c.key} for c in await sessions[r["session"]].inspect(r["name"])]}


async def stats(r):
    seen = sessions[r["session"]].stats()
    return {name: getattr(seen, name) for name in ("locks", "holds_lost", "leases_lost", "renewals", "requests")}


async def local(call):
    return call()


CALLS = {
    "connect": connect,
    "mutex": mutex,
    "lock": lock,
    "try_lock": try_lock,
    "unlock": lambda r: mutexes[r["mutex"]].unlock(),
    "state": lambda r: local(lambda: state(mutexes[r["mutex"]])),
    "check": lambda r: local(holds[r["mutex"]].check),
    "put": lambda r: holds[r["mutex"]].put(r["key"], r["value"]),
    "get": get,
    "delete": lambda r: holds[r["mutex"]].delete(r["key"]),
    "inspect": inspect,
    "stats": stats,
    "close": lambda r: sessions[r["session"]].close(r.get("timeout", 5000) / 1000),
    "cancel": lambda r: local(lambda: tasks.get(r["op"]) and tasks[r["op"]].cancel() and None),
}


async def serve(r, start):
    try:
        result = await CALLS[r["do"]](r) or {}
    except etcdlock.Error as error:
        result = {"kind": error.kind, "message": str(error)}
    except asyncio.CancelledError:
        result = {"kind": "CANCELLED", "message": ""}
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    say(**{"id": r["id"], "from": start}, at=now(), **result)
    tasks.pop(r["id"], None)


async def main():
    say(driver="asyncio", version=etcdlock.__version__, lacks="")
    stdin = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    while line := await stdin.readline():
        request = json.loads(line)
        tasks[request["id"]] = asyncio.create_task(serve(request, now()))


asyncio.run(main())
