"""Read by mypy --strict only: the public API, used as its types say."""

from __future__ import annotations

import threading

from typing_extensions import assert_type

import etcdlock


def sync() -> None:
    with etcdlock.connect(["a:1", "b:2"], ttl=10) as session:
        assert_type(session, etcdlock.Session)
        mutex = session.mutex("/a")
        with mutex as hold:
            assert_type(hold, etcdlock.Hold)
            assert_type(hold.get("k"), "bytes | None")
        with mutex.lock(timeout=5) as hold:
            assert_type(hold.token, int)
        if tried := mutex.try_lock():
            assert_type(tried, etcdlock.Hold)
        assert_type(mutex.acquire(blocking=True, timeout=-1), bool)
        assert_type(session.inspect("/a"), "list[etcdlock.Contender]")
    lock: threading.Lock = mutex  # type: ignore[assignment]  # it stands in for one, but is none
    del lock


def returns_from_the_block(mutex: etcdlock.Mutex) -> int:
    # A with block that could swallow exceptions would make mypy ask for a return after it.
    with mutex:
        return 1


async def asynchronous() -> None:
    async with etcdlock.aio.connect("memory:") as session:
        assert_type(session, etcdlock.aio.Session)
        async with session.mutex("/a").lock(timeout=5) as hold:
            assert_type(hold, etcdlock.aio.Hold)
        assert_type(await session.mutex("/a").lock(), etcdlock.aio.Hold)
        assert_type(await session.mutex("/a").try_lock(), "etcdlock.aio.Hold | None")
        assert_type(await hold.lost(), str)
        session.mutex("/a").lock(timeout="5")  # type: ignore[arg-type]
