"""The smoke part, without pytest: smoke.py TARGET. For the wheel in a clean virtual environment."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import etcdlock


def main(target: str) -> None:
    name = f"/smoke/{os.getpid()}"
    with etcdlock.connect(target, ttl=10) as session:
        mutex = session.mutex(name)
        with mutex as hold:
            assert hold.is_held() and mutex.try_lock() is None
            hold.put(f"{name}.state", b"paid")
            assert hold.get(f"{name}.state") == b"paid"
            hold.delete(f"{name}.state")
            assert [entry.language for entry in session.inspect(name)] == ["python"]
            try:
                mutex.lock(timeout=0.05)
            except etcdlock.LockTimeout as error:
                assert isinstance(error, TimeoutError)
            else:
                raise AssertionError("entered twice")
        count = [0]

        def work() -> None:
            for _ in range(50):
                with mutex:
                    count[0] += 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert count == [200] and session.inspect(name) == []
        asyncio.run(tasks(target, f"{name}/aio"))
    print(f"etcdlock {etcdlock.__version__} works in CPython {sys.version.split()[0]} at {target.split(':')[0]}")


async def tasks(target: str, name: str) -> None:
    async with etcdlock.aio.connect(target) as session:
        mutex = session.mutex(name)

        async def work() -> None:
            for _ in range(10):
                async with mutex.lock(timeout=60) as hold:
                    await asyncio.sleep(0)
                    hold.check()

        await asyncio.gather(*(work() for _ in range(10)))
        async with mutex:
            task = asyncio.ensure_future(waiting(mutex))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await session.inspect(name) == []


async def waiting(mutex: etcdlock.aio.Mutex) -> None:
    await mutex.lock()


if __name__ == "__main__":
    main(sys.argv[1])
