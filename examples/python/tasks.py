"""Ten asyncio tasks take turns at one lock: tasks.py TARGET"""

import asyncio
import sys

import etcdlock


async def work(mutex: etcdlock.aio.Mutex, number: int) -> None:
    async with mutex.lock(timeout=30) as hold:
        await hold.put("/demo/last", f"task {number}")
        print(f"task {number} has the lock, token {hold.token}", flush=True)


async def main(target: str) -> None:
    async with etcdlock.aio.connect(target, ttl=10) as session:
        mutex = session.mutex("/demo/tasks")
        await asyncio.gather(*(work(mutex, number) for number in range(10)))

        # A lock that is not there in time, and one that is cancelled, leave nothing behind.
        async with mutex:
            try:
                await mutex.lock(timeout=0.1)
            except etcdlock.LockTimeout as error:
                print(error)
        print("in the queue now:", await session.inspect("/demo/tasks"))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory:"))
