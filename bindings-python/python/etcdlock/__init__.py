"""A distributed mutex on etcd: leases that renew themselves, fencing tokens, one round trip.

    import etcdlock

    with etcdlock.connect("127.0.0.1:2379", ttl=10) as session:
        mutex = session.mutex("/orders/42")
        with mutex.lock(timeout=5) as hold:
            hold.put("/orders/42/state", b"paid")  # applied only while the lock is ours

For asyncio the same is in etcdlock.aio. A lock cannot stop a paused process from writing when it
wakes up: let the resource refuse old tokens (hold.token), or write through hold.put().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._errors import (
    Cancelled,
    Closed,
    Deadlock,
    Denied,
    Error,
    Forked,
    Internal,
    Invalid,
    LockBusy,
    LockLost,
    LockTimeout,
    NotHeld,
    Unavailable,
)
from ._native import Contender, Hold, Mutex, Session, Stats, __version__, connect

if TYPE_CHECKING:
    from . import aio as aio

__all__ = [
    "Cancelled",
    "Closed",
    "Contender",
    "Deadlock",
    "Denied",
    "Error",
    "Forked",
    "Hold",
    "Internal",
    "Invalid",
    "LockBusy",
    "LockLost",
    "LockTimeout",
    "Mutex",
    "NotHeld",
    "Session",
    "Stats",
    "Unavailable",
    "__version__",
    "aio",
    "connect",
]


def __getattr__(name: str) -> Any:
    # Only who uses etcdlock.aio pays for importing asyncio.
    if name == "aio":
        import importlib

        return importlib.import_module(".aio", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
