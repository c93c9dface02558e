"""The cases. Each is written once: `@alone` runs it for every language, `@pair` for every ordered pair of languages (each in a
process of its own), `@peer` for every language beside each of etcd's own clients, `@together` once with all of them."""

import asyncio
import itertools
import os
import signal
from dataclasses import dataclass

from driving import Call, Driver, Etcd, HANG, Refused, Session, until
from languages import ROOT

ALONE, PAIR, PEER, TOGETHER = [], [], [], []


def alone(case):
    ALONE.append(case)
    return case


def pair(case):
    PAIR.append(case)
    return case


def peer(case):
    PEER.append(case)
    return case


def together(case):
    TOGETHER.append(case)
    return case


@dataclass
class Place:
    """Where a case runs: an etcd, and names of its own."""

    etcd: Etcd
    locked_etcd: Etcd
    name: str
    # Messages of bad arguments, by what was wrong and language: compared at the end.
    messages: dict
    # Which of etcd's own clients are here.
    peers: list[str]

    @property
    def target(self) -> str:
        return self.etcd.endpoint

    async def gone(self, name: str | None = None) -> None:
        """Nothing is left in the queue."""
        await until(f"no key of {name or self.name}", lambda: self._none(name or self.name))

    async def _none(self, name: str) -> bool:
        return not await self.etcd.keys(name)

    async def queued(self, count: int, name: str | None = None) -> None:
        """So many stand in the queue."""
        await until(f"{count} keys of {name or self.name}", lambda: self._count(name or self.name, count))

    async def _count(self, name: str, count: int) -> bool:
        return len(await self.etcd.keys(name)) == count


async def refused(call, *kinds: str) -> Refused:
    try:
        answer = await call
    except Refused as error:
        assert error.kind in kinds, f"{error} instead of {kinds}"
        return error
    raise AssertionError(f"{kinds} was expected: {answer}")


async def locked(driver: Driver, place: Place, **options) -> tuple:
    """A session, a mutex, and what the lock answered."""
    session = await driver.connect(place.target, **options)
    mutex = await session.mutex(place.name)
    return session, mutex, await mutex.lock(timeout=20_000)


# ---------------------------------------------------------------- alone


@alone
async def a_lock_has_a_token_and_unlocking_takes_its_key_away(d, place):
    session, mutex, got = await locked(d, place)
    [key] = await place.etcd.range(f"{place.name}/")
    assert got["held"] and got["token"] == key["created"] and key["lease"] == session.lease, (got, key)
    assert 0 < got["remaining"] <= 15_000
    await mutex.check()
    await mutex.unlock()
    assert await place.etcd.keys(place.name) == []
    after = await mutex.state()
    assert not after["held"] and after["remaining"] == 0, after


@alone
async def tokens_rise(d, place):
    session, mutex, got = await locked(d, place)
    for _ in range(5):
        await mutex.unlock()
        again = await mutex.lock()
        assert again["token"] > got["token"], (again, got)
        got = again
    await mutex.unlock()


@alone
async def a_try_takes_a_free_lock_and_leaves_no_trace_of_itself_on_a_taken_one(d, place):
    session = await d.connect(place.target)
    one, two = await session.mutex(place.name), await session.mutex(place.name)
    other = await (await d.connect(place.target)).mutex(place.name)
    got = await one.try_lock()
    assert got["held"]
    before = await place.etcd.range(f"{place.name}/")
    await refused(two.try_lock(), "BUSY")
    await refused(other.try_lock(), "BUSY")
    assert await place.etcd.range(f"{place.name}/") == before
    await one.unlock()
    assert (await other.try_lock())["token"] > got["token"]
    await other.unlock()


@alone
async def a_lock_that_timed_out_leaves_nothing_behind(d, place):
    _, holder, _ = await locked(d, place)
    before = await place.etcd.range(f"{place.name}/")
    session = await d.connect(place.target)
    waiter = await session.mutex(place.name)
    for timeout in (0, 1, 50, 300):
        error = await refused(waiter.lock(timeout=timeout), "TIMEOUT")
        assert place.name in error.message and place.target in error.message, error
    await until("only the holder's key", lambda: _same(place, before))
    await holder.unlock()
    assert (await waiter.lock(timeout=0))["held"]
    await waiter.unlock()


async def _same(place, before) -> bool:
    return await place.etcd.range(f"{place.name}/") == before


@alone
async def what_is_not_held_cannot_be_unlocked(d, place):
    session = await d.connect(place.target)
    mutex = await session.mutex(place.name)
    error = await refused(mutex.unlock(), "NOT_HELD")
    assert place.name in error.message
    await mutex.lock()
    await mutex.unlock()
    await refused(mutex.unlock(), "NOT_HELD")
    await refused(mutex.check(), "NOT_HELD")
    # Nor by another mutex of that name.
    other = await session.mutex(place.name)
    await mutex.lock()
    await refused(other.unlock(), "NOT_HELD")
    assert (await mutex.state())["held"]
    await mutex.unlock()


@alone
async def a_revoked_lease_is_told_once_with_its_reason_and_the_session_goes_on(d, place):
    session, mutex, got = await locked(d, place)
    await place.etcd.revoke(session.lease)
    event = await mutex.lost(got["token"])
    assert "the lease has expired or was revoked" in event["reason"] or "its key was deleted" in event["reason"], event
    after = await mutex.state()
    assert not after["held"] and after["remaining"] == 0, after
    await refused(mutex.check(), "LOST")
    await refused(mutex.put(f"{place.name}.state", "late"), "LOST")
    assert await place.etcd.get(f"{place.name}.state") is None
    error = await refused(mutex.unlock(), "LOST")
    assert str(got["token"]) in error.message and place.name in error.message
    again = await mutex.lock()
    assert again["held"] and again["token"] > got["token"]
    assert (await session.stats())["holds_lost"] == 1
    await mutex.unlock()


@alone
async def a_deleted_key_is_told_with_its_reason(d, place):
    _, mutex, got = await locked(d, place)
    # The hold watches its key once it has lasted for a moment; before that the delete is found by a look.
    [key] = await place.etcd.keys(place.name)
    await place.etcd.delete(key)
    event = await mutex.lost(got["token"])
    assert "its key was deleted" in event["reason"], event
    assert not (await mutex.state())["held"]
    await refused(mutex.unlock(), "LOST")


@alone
async def a_released_hold_is_not_lost(d, place):
    session, mutex, got = await locked(d, place)
    await mutex.unlock()
    await session.close()
    assert not d._loss(mutex.label, got["token"]).done()


@alone
async def guarded_writes_apply_while_the_lock_is_held(d, place):
    _, mutex, got = await locked(d, place)
    key = f"{place.name}.state"
    assert (await mutex.get(key))["value"] is None
    await mutex.put(key, "päid")
    assert (await mutex.get(key))["value"] == "päid" == await place.etcd.get(key)
    await mutex.delete(key)
    await mutex.delete(key)
    assert (await mutex.get(key))["value"] is None
    await refused(mutex.put("", "x"), "INVALID")
    await mutex.unlock()
    await refused(mutex.put(key, "late"), "NOT_HELD")
    assert await place.etcd.get(key) is None


@alone
async def inspect_shows_owner_language_and_order(d, place):
    holding, mutex, got = await locked(d, place, owner="the holder")
    waiting = await d.connect(place.target, owner="the waiter")
    waiter = await waiting.mutex(place.name)
    call = waiter.lock()
    # One process has one place in a queue, so a waiter of the same process does not show.
    shown = await holding.inspect(place.name)
    assert [c["owner"] for c in shown] == ["the holder"], shown
    assert shown[0]["holder"] and shown[0]["token"] == got["token"] and shown[0]["pid"] == d.process.pid, shown
    # Both Pythons are Python.
    assert shown[0]["language"] == {"asyncio": "python"}.get(d.language, d.language), shown
    assert shown[0]["key"] in await place.etcd.keys(place.name) and shown[0]["host"] and shown[0]["age"] >= 0, shown
    assert await holding.inspect(f"{place.name}.none") == []
    await mutex.unlock()
    await call
    assert [c["owner"] for c in await holding.inspect(place.name)] == ["the waiter"]
    await waiter.unlock()


@alone
async def bad_arguments_give_the_same_error_everywhere(d, place):
    session = await d.connect(place.target)
    tries = {
        "an empty name": session.mutex(""),
        "a long name": session.mutex("x" * 1025),
        "a long name to inspect": session.inspect("x" * 1025),
        "a short TTL": d.connect(place.target, ttl=1000),
        "a long TTL": d.connect(place.target, ttl=100_000_000),
        "no time to connect": d.connect(place.target, connect_timeout=0),
        "no time to hold": d.connect(place.target, max_hold=0),
        "a user without a password": d.connect(place.target, user="somebody"),
        "a bad port": d.connect("127.0.0.1:99999"),
        "an unknown scheme": d.connect("ftp://127.0.0.1:1"),
        "an endpoint of nothing": d.connect("127.0.0.1:1,,127.0.0.1:2"),
    }
    for what, call in tries.items():
        error = await refused(call, "INVALID")
        place.messages.setdefault(what, {})[d.language] = error.message


@alone
async def closing_a_session_ends_all_that_is_its(d, place):
    session, mutex, got = await locked(d, place)
    other = await (await d.connect(place.target)).mutex(place.name)
    waiting = (await session.mutex(place.name)).lock()
    still = other.lock()
    await session.close()
    await refused(waiting, "CLOSED")
    assert (await mutex.lost(got["token"]))["token"] == got["token"]
    assert session.lease not in await place.etcd.leases()
    await refused(mutex.lock(), "CLOSED")
    await refused(mutex.try_lock(), "CLOSED")
    assert (await still)["token"] > got["token"], "a waiter of another session goes on"
    await other.unlock()
    await place.gone()


@alone
async def a_namespace_is_a_prefix(d, place):
    inside = await d.connect(place.target, namespace=f"{place.name}/ns/")
    outside = await d.connect(place.target)
    mutex, full = await inside.mutex("x"), await outside.mutex(f"{place.name}/ns/x")
    got = await mutex.lock()
    await refused(full.try_lock(), "BUSY")
    [shown] = await inside.inspect("x")
    assert shown["token"] == got["token"] and shown["key"].startswith(f"{place.name}/ns/x/")
    # The keys of guarded writes are used as given.
    await mutex.put(f"{place.name}.raw", "1")
    assert await place.etcd.get(f"{place.name}.raw") == "1"
    await mutex.unlock()


@alone
async def nested_names_are_independent(d, place):
    session = await d.connect(place.target)
    outer, inner = await session.mutex(place.name), await session.mutex(f"{place.name}/b")
    for first, second in ((outer, inner), (inner, outer)):
        await first.lock()
        assert (await second.try_lock())["held"]
        await second.unlock()
        assert (await second.lock(timeout=10_000))["held"]
        await second.unlock()
        await first.unlock()


@alone
async def names_may_have_any_letters(d, place):
    session = await d.connect(place.target, owner="Zoë")
    mutex = await session.mutex(f"{place.name} ü/日本/…")
    got = await mutex.lock()
    [shown] = await session.inspect(f"{place.name} ü/日本/…")
    assert shown["token"] == got["token"] and shown["owner"] == "Zoë"
    await mutex.unlock()


@alone
async def a_cancelled_lock_leaves_nothing_behind(d, place):
    if "cancel" in d.lacks:
        return "its lock() is interrupted by signals; bindings-python's own tests show it"
    _, holder, got = await locked(d, place)
    before = await place.etcd.range(f"{place.name}/")
    session = await d.connect(place.target)
    for pause in (0, 0, 0.001, 0.003, 0.01, 0.1):
        waiter = await session.mutex(place.name)
        call = waiter.lock()
        await asyncio.sleep(pause)
        await call.cancel()
        await refused(call, "CANCELLED")
    await until("only the holder's key", lambda: _same(place, before))
    # At the moment of the grant: a hold, or nothing.
    waiter = await session.mutex(place.name)
    call = waiter.lock()
    await asyncio.gather(holder.unlock(), call.cancel())
    try:
        assert (await call)["token"] > got["token"]
        await waiter.unlock()
    except Refused as error:
        assert error.kind == "CANCELLED"
    await place.gone()


@alone
async def a_hold_that_is_kept_too_long_is_lost(d, place):
    session, mutex, got = await locked(d, place, max_hold=200)
    assert "max_hold" in (await mutex.lost(got["token"]))["reason"]
    await place.gone()
    await refused(mutex.unlock(), "LOST")


@alone
async def twenty_locks_of_one_name_in_one_session_take_turns(d, place):
    session = await d.connect(place.target)
    inside, tokens = 0, []

    async def turn():
        nonlocal inside
        mutex = await session.mutex(place.name)
        got = await mutex.lock()
        inside += 1
        assert inside == 1 and got["held"], f"{inside} inside"
        tokens.append(got["token"])
        await mutex.check()
        inside -= 1
        await mutex.unlock()

    await asyncio.gather(*(turn() for _ in range(20)))
    assert tokens == sorted(set(tokens)), tokens
    assert (await session.stats())["locks"] == 20
    await place.gone()


@alone
async def one_mutex_shared_by_many_takes_turns(d, place):
    session = await d.connect(place.target)
    mutex = await session.mutex(place.name)
    calls = [mutex.lock() for _ in range(5)]
    tokens = set()
    while calls:
        done, _ = await asyncio.wait([call.answer for call in calls], return_when=asyncio.FIRST_COMPLETED, timeout=HANG)
        assert len(done) == 1, f"{len(done)} hold it at once"
        tokens.add(done.pop().result()["token"])
        calls = [call for call in calls if not call.done()]
        await mutex.unlock()
    assert len(tokens) == 5


@alone
async def a_target_of_nobody_is_unavailable_within_the_time_given(d, place):
    error = await refused(d.connect("127.0.0.1:1", connect_timeout=300), "UNAVAILABLE")
    assert "127.0.0.1:1" in error.message, error


@alone
async def a_wrong_password_is_denied_at_once(d, place):
    target = place.locked_etcd.endpoint
    error = await refused(d.connect(target, user="root", password="wrong", connect_timeout=60_000), "DENIED")
    assert target in error.message
    session = await d.connect(target, user="root", password="secret")
    mutex = await session.mutex(place.name)
    assert (await mutex.lock())["held"]
    await mutex.unlock()
    await session.close()


@alone
async def the_ttl_that_etcd_granted_is_told(d, place):
    assert (await d.connect(place.target, ttl=2500)).ttl == 3000
    assert (await d.connect(place.target)).ttl == 15_000


@alone
async def memory_needs_no_etcd(d, place):
    session = await d.connect(f"memory:{place.name}")
    one, two = await session.mutex("x"), await session.mutex("x")
    got = await one.lock()
    waiting = two.lock()
    await one.unlock()
    assert (await waiting)["token"] > got["token"]
    await two.unlock()
    await session.close()


# ---------------------------------------------------------------- pairs


@pair
async def the_lock_passes_from_one_to_the_other(a, b, place):
    _, one, first = await locked(a, place)
    two = await (await b.connect(place.target)).mutex(place.name)
    await refused(two.try_lock(), "BUSY")
    await refused(two.lock(timeout=100), "TIMEOUT")
    waiting = two.lock()
    await place.queued(2)
    assert not waiting.done()
    await one.unlock()
    second = await waiting
    assert second["token"] > first["token"] and not (await one.state())["held"]
    await refused(one.try_lock(), "BUSY")
    await two.unlock()
    await place.gone()


@pair
async def the_queue_is_served_in_order(a, b, place):
    holding, one, got = await locked(a, place, owner="first")
    two = await (await b.connect(place.target, owner="second")).mutex(place.name)
    second = two.lock()
    await place.queued(2)
    # Behind: the same process as the holder. Its place in the queue is the holder's until the release.
    three = await holding.mutex(place.name)
    third = three.lock()
    await one.unlock()
    assert (await second)["held"]
    assert not third.done()
    shown = await until("both show", lambda: _shown(holding, place.name, 2))
    assert [c["owner"] for c in shown] == ["second", "first"] and [c["holder"] for c in shown] == [True, False], shown
    assert [c["pid"] for c in shown] == [b.process.pid, a.process.pid], shown
    await two.unlock()
    assert (await third)["held"]
    await three.unlock()
    await place.gone()


async def _shown(session: Session, name: str, count: int) -> list[dict] | None:
    shown = await session.inspect(name)
    return shown if len(shown) == count else None


@pair
async def guarded_writes_make_a_counter_exact(a, b, place):
    key, rounds, tokens = f"{place.name}.counter", 8, []

    async def count(driver: Driver):
        mutex = await (await driver.connect(place.target)).mutex(place.name)
        for _ in range(rounds):
            tokens.append((await mutex.lock())["token"])
            value = int((await mutex.get(key))["value"] or 0)
            await mutex.put(key, str(value + 1))
            await mutex.unlock()

    await asyncio.gather(count(a), count(b))
    assert await place.etcd.get(key) == str(2 * rounds)
    assert tokens == sorted(tokens), tokens
    await place.gone()


@pair
async def a_revoked_holder_hears_of_it_and_the_next_one_gets_the_lock(a, b, place):
    session, one, first = await locked(a, place)
    two = await (await b.connect(place.target)).mutex(place.name)
    waiting = two.lock()
    await place.queued(2)
    await place.etcd.revoke(session.lease)
    await one.lost(first["token"])
    second = await waiting
    assert second["token"] > first["token"]
    await refused(one.put(f"{place.name}.state", "late"), "LOST")
    await two.put(f"{place.name}.state", "mine")
    await refused(one.unlock(), "LOST")
    assert (await two.state())["held"], "the late unlock took the other's key"
    assert (await two.get(f"{place.name}.state"))["value"] == "mine"
    await two.unlock()


@pair
async def a_waiter_that_gives_up_is_passed_over(a, b, place):
    _, one, first = await locked(a, place)
    two = await (await b.connect(place.target)).mutex(place.name)
    if "cancel" in b.lacks:
        await refused(two.lock(timeout=200), "TIMEOUT")
    else:
        waiting = two.lock()
        await place.queued(2)
        await waiting.cancel()
        await refused(waiting, "CANCELLED")
    await place.queued(1)
    assert (await one.state())["held"]
    await one.unlock()
    assert (await one.lock(timeout=0))["held"]
    await one.unlock()


@pair
async def closing_the_holder_hands_the_lock_on(a, b, place):
    session, one, first = await locked(a, place)
    two = await (await b.connect(place.target)).mutex(place.name)
    waiting = two.lock()
    await place.queued(2)
    await session.close()
    assert (await waiting)["token"] > first["token"]
    await two.unlock()


@pair
async def a_killed_holder_is_followed_when_its_ttl_has_run_out(a, b, place):
    victim = await Driver.start(a.language)
    try:
        _, _, first = await locked(victim, place, ttl=2000)
        two = await (await b.connect(place.target)).mutex(place.name)
        waiting = two.lock()
        await place.queued(2)
        await victim.kill()
        assert (await waiting)["token"] > first["token"]
        await two.unlock()
    finally:
        await victim.kill()


@pair
async def a_killed_waiter_is_passed_over(a, b, place):
    _, one, first = await locked(a, place)
    victim = await Driver.start(b.language)
    try:
        (await (await victim.connect(place.target, ttl=2000)).mutex(place.name)).lock()
        await place.queued(2)
    finally:
        await victim.kill()
    behind = await (await b.connect(place.target)).mutex(place.name)
    waiting = behind.lock()
    await place.queued(3)
    await one.unlock()
    assert (await waiting)["token"] > first["token"]
    await behind.unlock()


@pair
async def a_holder_that_was_stopped_past_its_ttl_knows_that_it_lost(a, b, place):
    stopped = await Driver.start(a.language)
    try:
        _, one, first = await locked(stopped, place, ttl=2000)
        two = await (await b.connect(place.target)).mutex(place.name)
        waiting = two.lock()
        await place.queued(2)
        stopped.signal(signal.SIGSTOP)
        asked = one.state()
        second = await waiting
        await two.put(f"{place.name}.state", "mine")
        assert second["token"] > first["token"]
        stopped.signal(signal.SIGCONT)
        assert not (await asked)["held"], "it believes in the lock of another"
        await refused(one.put(f"{place.name}.state", "late"), "LOST")
        await one.lost(first["token"])
        await refused(one.unlock(), "LOST")
        assert (await two.state())["held"]
        assert (await two.get(f"{place.name}.state"))["value"] == "mine"
        await two.unlock()
    finally:
        await stopped.kill()


# ---------------------------------------------------------------- beside etcd's own clients


class Peer:
    """Go's concurrency.Mutex or `etcdctl lock`, holding or waiting until told."""

    def __init__(self, kind: str, process: asyncio.subprocess.Process) -> None:
        self.kind, self.process = kind, process

    @classmethod
    async def start(cls, kind: str, place: Place) -> "Peer":
        if kind == "go":
            command = [str(ROOT / "target/release/examples/go-peer"), "hold", place.target, place.name]
        else:
            command = [os.environ.get("ETCDCTL_BIN", "etcdctl"), "--endpoints", place.target, "lock", "--ttl", "10", place.name]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "ETCDCTL_API": "3", "PATH": f"{os.environ['PATH']}:{ROOT}/.venv/bin"},
        )
        if kind == "go":
            await process.stdout.readline()
            process.stdin.write(b"\n")
        return cls(kind, process)

    async def held(self) -> str:
        return (await asyncio.wait_for(self.process.stdout.readline(), HANG)).decode().strip()

    async def release(self) -> None:
        if self.kind == "go":
            self.process.stdin.close()
        else:
            self.process.send_signal(signal.SIGINT)
        await asyncio.wait_for(self.process.wait(), HANG)

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@peer
async def etcds_own_client_and_ours_stand_in_one_queue(d, kind, place):
    theirs = await Peer.start(kind, place)
    behind = None
    try:
        assert place.name in await theirs.held() or kind == "go"
        session = await d.connect(place.target, owner="ours")
        mutex = await session.mutex(place.name)
        await refused(mutex.try_lock(), "BUSY")
        await refused(mutex.lock(timeout=50), "TIMEOUT")
        await place.queued(1)
        waiting = mutex.lock()
        await place.queued(2)
        behind = await Peer.start(kind, place)
        shown = await until("all three show", lambda: _shown(session, place.name, 3))
        assert [c["owner"] for c in shown] == ["", "ours", ""], shown
        assert not waiting.done()
        next_line = asyncio.create_task(behind.held())
        await theirs.release()
        got = await waiting
        assert got["token"] == shown[1]["token"]
        assert not next_line.done(), "theirs came in beside ours"
        await mutex.unlock()
        await next_line
        await refused(mutex.try_lock(), "BUSY")
        await behind.release()
        assert (await mutex.lock(timeout=10_000))["token"] > got["token"]
        await mutex.unlock()
    finally:
        await theirs.end()
        if behind:
            await behind.end()


# ---------------------------------------------------------------- all together


@together
async def all_languages_stand_in_one_queue_and_a_killed_one_is_passed_over(drivers, place):
    own = [await Driver.start(language) for language in drivers]
    try:
        mutexes = [await (await d.connect(place.target, ttl=2000 if d.language == "python" else 15_000, owner=d.language)).mutex(place.name) for d in own]
        calls: list[Call] = []
        for place_in_queue, mutex in enumerate(mutexes):
            calls.append(mutex.lock())
            await place.queued(place_in_queue + 1)
        watcher = await own[0].connect(place.target)
        assert [c["owner"] for c in await watcher.inspect(place.name)] == list(drivers)
        tokens = [(await calls[0])["token"]]
        for driver, mutex, call, nobody in zip(own, mutexes, calls, itertools.count()):
            if driver.language == "python" and nobody:
                await driver.kill()
                continue
            tokens.append((await call)["token"])
            assert [c.done() for c in calls[nobody + 1:] if not c.driver.dead].count(True) == 0, "two hold it"
            await mutex.unlock()
        assert tokens[1:] == sorted(tokens[1:])
        await place.gone()
    finally:
        for driver in own:
            await driver.kill()


@together
async def everybody_competes_with_go_and_etcdctl_and_never_two_are_inside(drivers, place):
    rounds, inside, order = 12, set(), []

    async def ours(driver: Driver):
        mutex = await (await driver.connect(place.target)).mutex(place.name)
        for _ in range(rounds):
            got = await mutex.lock()
            await enter(driver.language, got["token"])
            await mutex.unlock()

    async def theirs(kind: str):
        for _ in range(3):
            one = await Peer.start(kind, place)
            try:
                await one.held()
                await enter(kind, None)
                await one.release()
            finally:
                await one.end()

    async def enter(who: str, token: int | None):
        assert not inside, f"{who} came in beside {inside}"
        inside.add(who)
        if token:
            order.append(token)
        await asyncio.sleep(0.001)
        inside.remove(who)

    await asyncio.gather(*(ours(d) for d in drivers.values()), *(theirs(kind) for kind in place.peers))
    assert order == sorted(set(order)) and len(order) == rounds * len(drivers), order
    await place.gone()
