"""Every call of the blocking API, on etcd and in memory."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

import etcdlock
from outside import Etcd, until


def test_a_mutex_is_a_context_manager_that_locks_and_unlocks(session: etcdlock.Session, name: str) -> None:
    mutex = session.mutex(name)
    with mutex as hold:
        assert hold.is_held() and mutex.is_held() and mutex.locked()
        assert mutex.token == hold.token > 0
        assert mutex.name == hold.name == name
        assert 0 < mutex.remaining() <= session.ttl and 0 < hold.remaining() <= session.ttl
        hold.check()
    assert not hold.is_held() and not mutex.is_held() and mutex.token is None
    assert mutex.remaining() == hold.remaining() == 0.0
    assert session.inspect(name) == []
    with pytest.raises(etcdlock.NotHeld):
        hold.check()


def test_a_hold_is_a_context_manager_and_can_be_unlocked_before_the_end(session: etcdlock.Session, name: str) -> None:
    with session.mutex(name).lock(timeout=5) as hold:
        assert hold.is_held()
        hold.unlock()
        assert session.inspect(name) == []
    with pytest.raises(etcdlock.NotHeld):
        hold.unlock()


def test_a_lock_that_is_taken_times_out_as_a_timeout_error(session: etcdlock.Session, name: str) -> None:
    with session.mutex(name):
        for timeout in (0, 0.05):
            with pytest.raises(etcdlock.LockTimeout, match=name) as raised:
                session.mutex(name).lock(timeout=timeout)
            assert isinstance(raised.value, TimeoutError) and isinstance(raised.value, etcdlock.Error)
            assert (raised.value.kind, raised.value.code) == ("TIMEOUT", 1)
        assert len(session.inspect(name)) == 1, "the waiter left something behind"
    with session.mutex(name).lock(timeout=0):
        pass


def test_try_lock_gives_a_hold_or_none(session: etcdlock.Session, name: str) -> None:
    first = session.mutex(name).try_lock()
    assert first
    assert session.mutex(name).try_lock() is None
    first.unlock()
    second = session.mutex(name).try_lock()
    assert second and second.token > first.token, "tokens rise"
    second.unlock()


def test_try_lock_sees_the_holder_in_another_session(target: str, name: str) -> None:
    with etcdlock.connect(target) as one, etcdlock.connect(target) as two, one.mutex(name):
        assert two.mutex(name).try_lock() is None
        with pytest.raises(etcdlock.LockTimeout):
            two.mutex(name).lock(timeout=0.05)


def test_the_body_s_own_exception_wins(session: etcdlock.Session, name: str) -> None:
    with pytest.raises(KeyError):
        with session.mutex(name) as hold:
            raise KeyError
    assert not hold.is_held() and session.inspect(name) == []


def test_unlock_of_what_is_not_held_says_so(session: etcdlock.Session, name: str) -> None:
    mutex = session.mutex(name)
    for release in (mutex.unlock, mutex.release):
        with pytest.raises(etcdlock.NotHeld, match=name) as raised:
            release()
        assert isinstance(raised.value, RuntimeError), "as threading.Lock"


def test_it_stands_in_for_a_threading_lock(session: etcdlock.Session, name: str) -> None:
    lock = session.mutex(name)
    assert lock.acquire() is True
    assert lock.locked() and lock.token
    assert lock.acquire(False) is False
    assert lock.acquire(blocking=False) is False
    assert lock.acquire(timeout=0.05) is False
    assert lock.acquire(True, 0) is False
    lock.release()
    assert not lock.locked()
    assert lock.acquire(blocking=False) is True
    lock.release()
    with pytest.raises(ValueError):
        lock.acquire(False, 1)
    with pytest.raises(ValueError):
        lock.acquire(True, -2)


def test_it_works_in_a_threading_condition(session: etcdlock.Session, name: str) -> None:
    condition = threading.Condition(session.mutex(name))  # type: ignore[arg-type]
    items: list[int] = []
    taken: list[int] = []

    def consume() -> None:
        while len(taken) < 20:
            with condition:
                assert condition.wait_for(lambda: items, timeout=30)
                taken.append(items.pop(0))

    consumer = threading.Thread(target=consume)
    consumer.start()
    for item in range(20):
        with condition:
            items.append(item)
            condition.notify()
    consumer.join(60)
    assert taken == list(range(20))


def test_threads_that_share_a_mutex_take_turns(session: etcdlock.Session, name: str) -> None:
    mutex, inside, most, rounds = session.mutex(name), [], [], []

    def work() -> None:
        for _ in range(25):
            with mutex as hold:
                inside.append(1)
                most.append(len(inside))
                rounds.append(hold.token)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(rounds) == 200 and max(most) == 1 and rounds == sorted(set(rounds))


def test_another_thread_may_release_as_with_a_threading_lock(session: etcdlock.Session, name: str) -> None:
    lock = session.mutex(name)
    lock.acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join(20)
    assert not lock.locked() and session.inspect(name) == []


def test_guarded_writes_go_through_the_hold(session: etcdlock.Session, name: str) -> None:
    key = f"{name}.state"
    with session.mutex(name) as hold:
        assert hold.get(key) is None
        hold.put(key, b"\x00paid")
        assert hold.get(key.encode()) == b"\x00paid"
        hold.put(key.encode(), "ü")
        assert hold.get(key) == "ü".encode()
        hold.put(key, b"")
        assert hold.get(key) == b""
        hold.delete(key)
        hold.delete(key)
        assert hold.get(key) is None
        with pytest.raises(etcdlock.Invalid):
            hold.put("", b"")
        with pytest.raises(TypeError, match="keys and values must be bytes or str, not int"):
            hold.put(key, 7)  # type: ignore[arg-type]
    with pytest.raises(etcdlock.NotHeld):
        hold.put(key, b"late")


def test_inspect_shows_the_holder_and_the_waiters_in_order(target: str, name: str) -> None:
    with etcdlock.connect(target, owner="one") as one, etcdlock.connect(target, owner="two") as two:
        with one.mutex(name) as hold:
            done = threading.Event()

            def wait() -> None:
                with two.mutex(name):
                    done.set()

            # Sessions of one process share a place in the queue, so the waiter has no entry of its own.
            waiter = threading.Thread(target=wait)
            waiter.start()
            (entry,) = one.inspect(name)
            assert entry.is_holder and entry.owner == "one" and entry.language == "python"
            assert entry.pid > 0 and entry.host and entry.token == hold.token
            assert entry.age is not None and 0 <= entry.age < 60 and entry.key.startswith(name)
            assert "holder" in repr(entry)
            assert not done.is_set()
        assert done.wait(20)
        waiter.join(20)


def test_a_hold_keeps_its_session_open(target: str, name: str) -> None:
    hold = etcdlock.connect(target).mutex(name).lock()
    hold.put(f"{name}.state", b"mine")
    hold.unlock()


def test_options_are_used(target: str, name: str) -> None:
    with etcdlock.connect([target], ttl=7, namespace="/space", owner="me", connect_timeout=20) as session:
        assert session.ttl == 7.0 and session.lease_id
        mutex = session.mutex(name)
        assert mutex.name == f"/space{name}"
        with mutex:
            assert session.inspect(name)[0].owner == "me"
        stats = session.stats()
        assert stats.locks == 1 and stats.holds_lost == 0 and stats.leases_lost == 0 and stats.requests > 2
        assert "locks=1" in repr(stats)


def test_a_hold_is_released_after_max_hold(target: str, name: str) -> None:
    with etcdlock.connect(target, max_hold=0.2) as session:
        heard: list[str] = []
        with pytest.raises(etcdlock.LockLost, match="max_hold"):
            with session.mutex(name) as hold:
                hold.on_lost(heard.append)
                until(lambda: heard)
        assert not hold.is_held()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"target": "redis://a:1"}, "scheme"),
        ({"target": []}, "empty"),
        ({"ttl": 1}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": float("nan")}, "ttl"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"connect_timeout": -1}, "connect_timeout"),
        ({"max_hold": 0}, "max_hold"),
        ({"user": "u"}, "password"),
        ({"cert": "c"}, "key"),
        ({"ca": Path("/no/such/file"), "target": "https://127.0.0.1:1"}, "/no/such/file"),
    ],
)
def test_a_bad_argument_is_named_at_once(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(etcdlock.Invalid, match=part) as raised:
        etcdlock.connect(**arguments)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("secret", ["S3cr3t\ud800", b"S3cr3t", ["S3cr3t"], {"pw": "S3cr3t"}])
def test_row_53_a_password_that_is_none_is_not_shown(secret: Any) -> None:
    with pytest.raises((etcdlock.Invalid, TypeError)) as raised:
        etcdlock.connect("memory:", user="u", password=secret)
    assert "password" in str(raised.value) and "S3cr3t" not in repr((raised.value, raised.value.args))


def test_a_bad_call_is_named_at_once(session: etcdlock.Session, name: str) -> None:
    for bad in ("", "x" * 1025, "a\0b"):
        with pytest.raises(etcdlock.Invalid):
            session.mutex(bad)
        with pytest.raises(etcdlock.Invalid):
            session.inspect(bad)
    for timeout in (-1, float("nan")):
        with pytest.raises(etcdlock.Invalid, match="timeout"):
            session.mutex(name).lock(timeout=timeout)
    with session.mutex(name).lock(timeout=float("inf")):
        pass
    with pytest.raises(TypeError, match="target must be a str or a list of str, not int"):
        etcdlock.connect(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        session.mutex(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        etcdlock.Mutex()
    with pytest.raises(UnicodeEncodeError):
        session.mutex("\ud800")


def test_connect_says_where_and_why_it_failed() -> None:
    with pytest.raises(etcdlock.Unavailable, match="127.0.0.1:1") as raised:
        etcdlock.connect("127.0.0.1:1", connect_timeout=0.3)
    assert isinstance(raised.value, ConnectionError)


def test_a_closed_session_says_so_and_loses_its_holds(target: str, name: str) -> None:
    session = etcdlock.connect(target)
    mutex = session.mutex(name)
    hold = mutex.lock()
    session.close()
    session.close(timeout=1)
    assert not hold.is_held() and hold.loss == "the session was closed"
    for call in (hold.check, hold.unlock):
        with pytest.raises(etcdlock.LockLost, match="closed"):
            call()
    for call in (mutex.lock, lambda: session.mutex(name), lambda: session.inspect(name)):
        with pytest.raises(etcdlock.Closed):
            call()


def test_close_ends_a_waiting_lock(target: str, name: str) -> None:
    with etcdlock.connect(target) as other, other.mutex(name):
        session = etcdlock.connect(target)
        mutex = session.mutex(name)
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                mutex.lock()
            except etcdlock.Error as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        session.close()
        waiter.join(20)
        assert [type(error) for error in errors] == [etcdlock.Closed]


def test_a_lock_whose_key_is_deleted_from_outside_is_lost_with_the_reason(etcd: Etcd, name: str) -> None:
    with etcdlock.connect(etcd.endpoint) as session:
        mutex = session.mutex(name)
        heard: list[str] = []
        with pytest.raises(etcdlock.LockLost, match="deleted from outside"):
            with mutex as hold:
                hold.on_lost(heard.append)
                etcd.delete_keys(name)
                until(lambda: heard)
                assert heard == [hold.loss] and not hold.is_held()
                hold.on_lost(heard.append)
                until(lambda: len(heard) == 2)
                with pytest.raises(etcdlock.LockLost):
                    hold.put(f"{name}.state", b"late")
        assert etcd.value(f"{name}.state") is None
        with mutex as again:
            assert again.token > hold.token
            assert hold.loss, "lost is for good"
        assert session.stats().holds_lost == 1


def test_a_session_whose_lease_is_revoked_goes_on(etcd: Etcd, name: str) -> None:
    with etcdlock.connect(etcd.endpoint, ttl=3) as session:
        lease = session.lease_id
        heard: list[str] = []
        with pytest.raises(RuntimeError, match="the body's own"):
            with session.mutex(name) as hold:
                hold.on_lost(heard.append)
                etcd.revoke(lease)
                until(lambda: heard)
                raise RuntimeError("the body's own")
        with session.mutex(name).lock(timeout=20):
            assert session.lease_id != lease and session.stats().leases_lost == 1


def test_after_a_loss_the_end_of_the_block_leaves_another_thread_s_hold_alone(etcd: Etcd, name: str) -> None:
    with etcdlock.connect(etcd.endpoint) as session:
        mutex = session.mutex(name)
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with mutex as hold:
                entered.set()
                assert leave.wait(20)
                hold.check()

        thread = threading.Thread(target=other)
        with pytest.raises(etcdlock.LockLost):
            with mutex:
                etcd.delete_keys(name)
                thread.start()
                assert entered.wait(20)
        assert mutex.is_held(), "the end of our block released the other's hold"
        leave.set()
        thread.join(20)


def test_an_exception_in_a_callback_does_not_stop_the_next(target: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: seen.append(hook.exc_type))
    session = etcdlock.connect(target)
    hold = session.mutex(name).lock()
    heard: list[str] = []

    def fails(reason: str) -> None:
        raise KeyError(reason)

    hold.on_lost(fails)
    hold.on_lost(heard.append)
    session.close()
    until(lambda: heard)
    assert seen == [KeyError]


def test_a_callback_may_use_the_library(target: str, name: str) -> None:
    with etcdlock.connect(target) as other:
        session = etcdlock.connect(target)
        hold = session.mutex(name).lock()
        tokens: list[int] = []

        def lock_elsewhere(reason: str) -> None:
            with other.mutex(name).lock(timeout=20) as mine:
                pass
            tokens.append(mine.token)

        hold.on_lost(lock_elsewhere)
        session.close()
        assert until(lambda: tokens)[0] > hold.token


def test_a_callback_is_not_called_after_a_release(session: etcdlock.Session, name: str) -> None:
    heard: list[str] = []
    with session.mutex(name) as hold:
        hold.on_lost(heard.append)
    session.close()
    assert heard == [] and hold.loss is None


@pytest.mark.parametrize("what", ["session", "mutex", "hold"])
def test_pickling_and_copying_say_what_to_do_instead(session: etcdlock.Session, name: str, what: str) -> None:
    with session.mutex(name) as hold:
        handle = {"session": session, "mutex": session.mutex(name), "hold": hold}[what]
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=f"{what} cannot be pickled or copied.*connect anew"):
                attempt(handle)


def test_every_error_kind_of_core_has_its_exception() -> None:
    from etcdlock import _errors, _native

    assert [(error.code, error.kind) for error in _errors.BY_CODE] == _native._error_kinds()
    for error in _errors.BY_CODE:
        assert getattr(etcdlock, error.__name__) is error and issubclass(error, etcdlock.Error)
        assert error.__module__ == "etcdlock" and error.__doc__
        assert str(pickle.loads(pickle.dumps(error("said")))) == "said"


def test_everything_public_is_documented() -> None:
    from etcdlock import aio

    undocumented = []
    for module in (etcdlock, aio):
        for name in module.__all__:
            thing = getattr(module, name)
            if name.startswith("__"):
                continue
            if not thing.__doc__:
                undocumented.append(name)
            if isinstance(thing, type) and not issubclass(thing, Exception):
                members = [member for member in vars(thing) if not member.startswith("_")]
                undocumented += [f"{name}.{member}" for member in members if not getattr(thing, member).__doc__]
    assert undocumented == []
