"""etcdlock.aio: every call, cancellation at every moment, several loops; rows 10 and 11 of the safety model."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

import etcdlock
from etcdlock import aio
from outside import Etcd, until

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine on a new event loop: the test runs once for each kind."""
    new_loop = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop

    def run(main: Coroutine[Any, Any, None]) -> None:
        loop = new_loop()
        try:
            loop.run_until_complete(asyncio.wait_for(main, 100))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run


async def settled(seen: Callable[[], object]) -> None:
    """Waits until it is so, without blocking the loop; the runner's limit ends it otherwise."""
    while not seen():
        await asyncio.sleep(0.005)


def test_lock_is_awaited_or_entered_from_the_same_call(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        session = await aio.connect(target, ttl=10)
        assert session.ttl == 10.0 and session.lease_id
        mutex = session.mutex(name)
        hold = await mutex.lock()
        assert hold.is_held() and mutex.is_held() and mutex.locked() and mutex.token == hold.token
        assert 0 < hold.remaining() <= 10 and 0 < mutex.remaining() <= 10 and mutex.name == hold.name == name
        hold.check()
        assert await mutex.try_lock() is None
        await hold.unlock()
        with pytest.raises(etcdlock.NotHeld):
            await hold.unlock()
        async with mutex.lock(timeout=5) as second:
            assert second.token > hold.token
        async with mutex as third:
            (entry,) = await session.inspect(name)
            assert entry.token == third.token > second.token and entry.language == "python"
        assert await session.inspect(name) == []
        tried = await mutex.try_lock()
        assert tried
        await mutex.unlock()
        assert not tried.is_held() and session.stats().locks == 4
        for call in (mutex.unlock, tried.unlock):
            with pytest.raises(etcdlock.NotHeld):
                await call()
        await session.close()
        with pytest.raises(etcdlock.Closed):
            await mutex.lock()

    run(main())


def test_a_timeout_leaves_nothing_behind(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session, session.mutex(name):
            for timeout in (0, 0.05):
                with pytest.raises(etcdlock.LockTimeout):
                    async with session.mutex(name).lock(timeout=timeout):
                        pytest.fail("entered")
            assert len(await session.inspect(name)) == 1
            with pytest.raises(etcdlock.Invalid):
                await session.mutex(name).lock(timeout=-1)

    run(main())


def test_guarded_writes_go_through_the_hold(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        key = f"{name}.state"
        async with aio.connect(target) as session, session.mutex(name) as hold:
            assert await hold.get(key) is None
            await hold.put(key, b"paid")
            assert await hold.get(key) == b"paid"
            await hold.delete(key)
            assert await hold.get(key) is None

    run(main())


def test_tasks_that_share_a_mutex_take_turns(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            mutex, inside, tokens = session.mutex(name), [0], []

            async def work() -> None:
                for _ in range(10):
                    async with mutex as hold:
                        inside[0] += 1
                        await asyncio.sleep(0)
                        assert inside[0] == 1
                        tokens.append(hold.token)
                        inside[0] -= 1

            await asyncio.gather(*(work() for _ in range(20)))
            assert len(tokens) == 200 and tokens == sorted(set(tokens))

    run(main())


def test_the_body_s_own_exception_wins(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            with pytest.raises(KeyError):
                async with session.mutex(name).lock():
                    raise KeyError
            assert await session.inspect(name) == []

    run(main())


def test_losing_the_hold_cancels_the_body_and_surfaces_as_lock_lost(run: Run, etcd: Etcd, name: str) -> None:
    async def main() -> None:
        async with aio.connect(etcd.endpoint) as session:
            for block in (session.mutex(name).lock, lambda: session.mutex(name)):
                cleaned_up = False
                with pytest.raises(etcdlock.LockLost, match="deleted from outside"):
                    async with block():
                        etcd.delete_keys(name)
                        try:
                            await asyncio.Event().wait()
                        finally:
                            cleaned_up = True
                assert cleaned_up
                # The task itself is not cancelled.
                await asyncio.sleep(0)
                if sys.version_info >= (3, 11):
                    task = asyncio.current_task()
                    assert task and task.cancelling() == 0

    run(main())


def test_a_body_that_raises_while_it_is_cancelled_for_a_loss_wins(run: Run, etcd: Etcd, name: str) -> None:
    async def main() -> None:
        async with aio.connect(etcd.endpoint) as session:
            with pytest.raises(KeyError):
                async with session.mutex(name).lock():
                    etcd.delete_keys(name)
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        raise KeyError from None
            with pytest.raises(etcdlock.LockLost):
                async with session.mutex(name).lock():
                    etcd.delete_keys(name)
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        pass  # swallowed; the end of the block says it all the same

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Task.uncancel is new in CPython 3.11")
def test_a_cancellation_from_elsewhere_stays_one_even_if_the_hold_is_lost_too(run: Run, etcd: Etcd, name: str) -> None:
    async def main() -> None:
        async with aio.connect(etcd.endpoint) as session:
            inside = asyncio.Event()
            holds: list[aio.Hold] = []

            async def body() -> None:
                async with session.mutex(name).lock() as hold:
                    holds.append(hold)
                    inside.set()
                    try:
                        await asyncio.Event().wait()
                    finally:
                        etcd.delete_keys(name)
                        task.cancel()
                        await hold.lost()

            task = asyncio.create_task(body())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not holds[0].is_held()

    run(main())


def test_lost_is_awaited_by_several_and_gives_the_reason(run: Run, etcd: Etcd, name: str) -> None:
    async def main() -> None:
        async with aio.connect(etcd.endpoint) as session:
            hold = await session.mutex(name).lock()
            gives_up = asyncio.create_task(hold.lost())
            waiters = [asyncio.create_task(hold.lost()) for _ in range(3)]
            await asyncio.sleep(0)
            gives_up.cancel()
            etcd.delete_keys(name)
            assert set(await asyncio.gather(*waiters)) == {"its key was deleted from outside"}
            assert hold.loss == await hold.lost() == "its key was deleted from outside"
            with pytest.raises(etcdlock.LockLost):
                hold.check()
            with pytest.raises(etcdlock.LockLost):
                await hold.unlock()

    run(main())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken"])
def test_a_lock_that_is_cancelled_at_any_tick_leaves_nothing(run: Run, target: str, name: str, taken: bool) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            holder = await session.mutex(name).lock() if taken else None
            before, tasks = descriptors(), asyncio.all_tasks()
            got = 0
            for ticks in range(150):
                task = asyncio.create_task(_lock(session.mutex(name)))
                for _ in range(ticks % 75):
                    await asyncio.sleep(0)
                    if ticks >= 75:
                        # Some ticks as long as a request, so that some fall after the grant.
                        await asyncio.sleep(0.00002)
                if task.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    got += 1
                    await (await task).unlock()
            assert asyncio.all_tasks() == tasks
            if holder:
                assert got == 0
                await holder.unlock()
            async with session.mutex(name).lock(timeout=20):
                pass
            while await session.inspect(name):
                await asyncio.sleep(0.005)
            await settled(lambda: descriptors() <= before)

    run(main())


async def _lock(mutex: aio.Mutex) -> aio.Hold:
    return await mutex.lock()


def test_a_grant_at_the_moment_of_the_cancellation_never_leaks(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        dice = random.Random(11)
        async with aio.connect(target) as session:
            mutex, granted, kept = session.mutex(name), 0, []
            for _ in range(200):
                holder = await mutex.lock(timeout=20)
                task = asyncio.create_task(_lock(mutex))
                await asyncio.sleep(0)
                unlocking = asyncio.create_task(holder.unlock())
                await asyncio.sleep(dice.random() * 0.001)
                task.cancel()
                try:
                    await (await task).unlock()
                    granted += 1
                except asyncio.CancelledError as error:
                    # Its traceback keeps everything alive that the call had.
                    kept.append(error)
                await unlocking
            async with mutex.lock(timeout=20):
                pass
            while await session.inspect(name):
                await asyncio.sleep(0.005)

    run(main())


def test_a_result_that_is_there_but_not_yet_fetched_is_given_back(run: Run, target: str, name: str) -> None:
    """The very moment: the grant has woken the loop, and the task is cancelled before it runs."""

    async def main() -> None:
        async with aio.connect(target) as session, aio.connect(target) as other:
            mutex, kept = session.mutex(name), []
            for _ in range(20):
                task = asyncio.create_task(_lock(mutex))
                await asyncio.sleep(0)
                # The loop is blocked here, so the grant can only have been noted.
                until(lambda: mutex.is_held())
                task.cancel()
                with pytest.raises(asyncio.CancelledError) as raised:
                    await task
                kept.append(raised.value)  # and all that its traceback keeps alive
                async with other.mutex(name).lock(timeout=20):
                    assert not mutex.is_held()

    run(main())


def test_a_cancelled_unlock_is_done_all_the_same(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            for _ in range(20):
                hold = await session.mutex(name).lock(timeout=20)
                task = asyncio.create_task(hold.unlock())
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert not hold.is_held()
            while await session.inspect(name):
                await asyncio.sleep(0.005)

    run(main())


def test_connect_can_be_cancelled(run: Run) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(aio.connect("127.0.0.1:1", connect_timeout=60).__aenter__())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(etcdlock.Unavailable):
            await aio.connect("127.0.0.1:1", connect_timeout=0.2)
        with pytest.raises(etcdlock.Invalid):
            await aio.connect("redis://a")

    run(main())


def test_a_session_serves_several_loops_and_threads_at_once(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            inside, tokens = [0], []

            async def work() -> None:
                for _ in range(10):
                    async with session.mutex(name) as hold:
                        inside[0] += 1
                        await asyncio.sleep(0)
                        assert inside[0] == 1
                        inside[0] -= 1
                        tokens.append(hold.token)

            threads = [threading.Thread(target=asyncio.run, args=(work(),)) for _ in range(4)]
            for thread in threads:
                thread.start()
            await work()
            for thread in threads:
                await asyncio.to_thread(thread.join, 60)
            assert len(tokens) == 50 and tokens == sorted(set(tokens))

    run(main())


def test_a_loop_that_is_closed_with_a_waiter_does_not_keep_the_lock(target: str, name: str) -> None:
    with etcdlock.connect(target) as session:
        holder = session.mutex(name).lock()
        loop = asyncio.new_event_loop()
        native = aio.Session(etcdlock.connect(target))
        task = loop.create_task(_lock(native.mutex(name)))
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
        holder.unlock()
        # It is the waiter's turn now, and nobody is there to take it.
        with session.mutex(name).lock(timeout=20):
            pass
        # Only for pytest, which looks at what asyncio says of it.
        task.get_loop().set_exception_handler(lambda loop, context: None)
        del task
        gc.collect()
        native._native.close()


def test_a_waiting_coroutine_that_is_dropped_gives_up(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            holder = await session.mutex(name).lock()
            waiting = _lock(session.mutex(name))
            waiting.send(None)  # a first step, outside of any task
            waiting.close()
            del waiting
            gc.collect()
            await holder.unlock()
            while await session.inspect(name):
                await asyncio.sleep(0.005)

    run(main())


def test_a_hold_that_is_dropped_is_released_with_a_warning_that_says_where(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            with pytest.warns(ResourceWarning, match=r"test_aio\.py:\d+\) was dropped while held"):
                await session.mutex(name).lock()
                gc.collect()
            async with session.mutex(name).lock(timeout=20):
                pass

    run(main())


def test_a_lock_that_is_never_awaited_warns(run: Run, name: str) -> None:
    async def main() -> None:
        async with aio.connect("memory:") as session:
            with pytest.warns(RuntimeWarning, match=r"lock\(\) was never awaited"):
                session.mutex(name).lock()
                gc.collect()
            once = session.mutex(name).lock()
            await (await once).unlock()
            with pytest.raises(RuntimeError, match="awaited before"):
                await once

    run(main())


def test_handles_cannot_be_pickled_or_copied(run: Run, name: str) -> None:
    async def main() -> None:
        async with aio.connect("memory:") as session, session.mutex(name) as hold:
            for what, handle in (("session", session), ("mutex", session.mutex(name)), ("hold", hold)):
                assert what in repr(handle).lower()
                for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
                    with pytest.raises(TypeError, match=f"{what} cannot be pickled"):
                        attempt(handle)

    run(main())


def test_the_loop_is_free_while_a_task_waits(run: Run, target: str, name: str) -> None:
    async def main() -> None:
        async with aio.connect(target) as session:
            holder = await session.mutex(name).lock()
            task = asyncio.create_task(_lock(session.mutex(name)))
            for _ in range(1000):
                await asyncio.sleep(0)
            assert not task.done()
            await holder.unlock()
            await (await task).unlock()

    run(main())
