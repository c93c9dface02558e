"""The suite's driver for blocking Python: a thread for each request. See ../README.md."""

import json
import sys
import threading
import time

import etcdlock

sessions, mutexes, holds = {}, {}, {}
printing = threading.Lock()


def now():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def say(**line):
    with printing:
        print(json.dumps(line), flush=True)


def seconds(request, name):
    return None if name not in request else request[name] / 1000


def state(mutex):
    seen = now()
    return {"held": mutex.is_held(), "remaining": int(mutex.remaining() * 1000), "token": mutex.token or 0, "seen": seen}


def granted(name, hold):
    holds[name] = hold
    hold.on_lost(lambda reason: say(event="lost", mutex=name, token=hold.token, reason=reason, at=now()))
    return state(mutexes[name])


def connect(r):
    given = {name: r[name] for name in ("namespace", "owner", "user", "password") if name in r}
    times = {name: seconds(r, name) for name in ("ttl", "connect_timeout", "max_hold")}
    session = sessions[r["session"]] = etcdlock.connect(r.get("target"), **given, **times)
    return {"ttl": int(session.ttl * 1000), "lease": str(session.lease_id or 0)}


def try_lock(r):
    hold = mutexes[r["mutex"]].try_lock()
    return granted(r["mutex"], hold) if hold else {"kind": "BUSY", "message": ""}


def inspect(r):
    return {"contenders": [
        {"holder": c.is_holder, "owner": c.owner, "host": c.host, "pid": c.pid, "language": c.language, "token": c.token,
         "age": -1 if c.age is None else int(c.age * 1000), "key": c.key} for c in sessions[r["session"]].inspect(r["name"])]}


def get(r):
    value = holds[r["mutex"]].get(r["key"])
    return {"value": None if value is None else value.decode()}


def stats(r):
    seen = sessions[r["session"]].stats()
    return {name: getattr(seen, name) for name in ("locks", "holds_lost", "leases_lost", "renewals", "requests")}


CALLS = {
    "connect": connect,
    "mutex": lambda r: mutexes.update({r["mutex"]: sessions[r["session"]].mutex(r["name"])}),
    "lock": lambda r: granted(r["mutex"], mutexes[r["mutex"]].lock(seconds(r, "timeout"))),
    "try_lock": try_lock,
    "unlock": lambda r: mutexes[r["mutex"]].unlock(),
    "state": lambda r: state(mutexes[r["mutex"]]),
    "check": lambda r: holds[r["mutex"]].check(),
    "put": lambda r: holds[r["mutex"]].put(r["key"], r["value"]),
    "get": get,
    "delete": lambda r: holds[r["mutex"]].delete(r["key"]),
    "inspect": inspect,
    "stats": stats,
    "close": lambda r: sessions[r["session"]].close(r.get("timeout", 5000) / 1000),
}


def serve(r, start):
    try:
        result = CALLS[r["do"]](r) or {}
    except etcdlock.Error as error:
        result = {"kind": error.kind, "message": str(error)}
    say(**{"id": r["id"], "from": start}, at=now(), **result)


say(driver="python", version=etcdlock.__version__, lacks="cancel")
for line in sys.stdin:
    threading.Thread(target=serve, args=(json.loads(line), now()), daemon=True).start()
