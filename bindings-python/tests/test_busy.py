"""Rows 31 and 32 of the safety model: the garbage collector, and an interpreter that is busy. And the logging."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref

import pytest

import etcdlock
from outside import Etcd, Program, until

# ---- row 31: dropped ---------------------------------------------------------------------------


def test_a_hold_that_is_dropped_is_released_with_one_warning_that_says_where(session: etcdlock.Session, name: str) -> None:
    with pytest.warns(ResourceWarning, match="dropped while held") as warned:
        session.mutex(name).lock()
        gc.collect()
    assert len(warned) == 1 and "test_busy.py:" in str(warned[0].message) and name in str(warned[0].message)
    with session.mutex(name).lock(timeout=20):
        pass


def test_a_mutex_that_is_dropped_with_its_hold_releases_it(session: etcdlock.Session, name: str) -> None:
    with pytest.warns(ResourceWarning, match="dropped while held") as warned:
        session.mutex(name).acquire()
        gc.collect()
    assert len(warned) == 1
    with session.mutex(name).lock(timeout=20):
        pass


def test_a_hold_in_a_cycle_through_its_own_callback_is_collected(session: etcdlock.Session, name: str) -> None:
    class Owner:
        def __init__(self) -> None:
            self.hold = session.mutex(name).lock()
            self.hold.on_lost(self.lost)

        def lost(self, reason: str) -> None: ...

    with pytest.warns(ResourceWarning, match="dropped while held"):
        gone = weakref.ref(Owner())
        gc.collect()
    assert gone() is None
    with session.mutex(name).lock(timeout=20):
        pass


def test_a_hold_that_is_dropped_in_another_thread_is_released(session: etcdlock.Session, name: str) -> None:
    holds = [session.mutex(name).lock()]
    thread = threading.Thread(target=holds.clear)
    with pytest.warns(ResourceWarning, match="dropped while held"):
        thread.start()
        thread.join(20)
    with session.mutex(name).lock(timeout=20):
        pass


def test_dropping_it_while_an_exception_is_on_its_way_keeps_the_exception(session: etcdlock.Session, name: str) -> None:
    def fails() -> None:
        hold = session.mutex(name).lock()
        raise KeyError(hold.token)

    with pytest.warns(ResourceWarning, match="dropped while held"):
        with pytest.raises(KeyError):
            fails()
        gc.collect()


def test_a_hold_that_was_unlocked_or_lost_is_dropped_without_a_warning(target: str, name: str) -> None:
    # Warnings are errors in this suite.
    session = etcdlock.connect(target)
    session.mutex(name).lock().unlock()
    lost = session.mutex(name).lock()
    session.close()
    del lost
    gc.collect()


def test_a_session_that_is_dropped_closes_in_the_background(etcd: Etcd, name: str) -> None:
    before = etcd.leases()
    session = etcdlock.connect(etcd.endpoint)
    assert etcd.leases() == before + 1
    mutex = session.mutex(name)
    del session
    with mutex:
        pass
    del mutex
    gc.collect()
    until(lambda: etcd.leases() == before)


# ---- row 32: busy ------------------------------------------------------------------------------

BUSY = """
import ctypes, sys, time, etcdlock
target, name, how = sys.argv[1:]
session = etcdlock.connect(target, ttl=5)    # not one that a busy machine misses by itself
hold = session.mutex(name).lock()
if how == "C code":
    ctypes.PyDLL(None).sleep(15)      # PyDLL keeps the GIL
elif how == "a busy loop":
    sys.setswitchinterval(1000)       # nobody else gets the GIL
    end = time.monotonic() + 15
    while time.monotonic() < end: pass
else:
    import asyncio
    async def main():
        async with etcdlock.aio.Session(session).mutex(name + ".aio") as other:
            time.sleep(15)            # the event loop stands still
            other.check()
            await other.unlock()
    asyncio.run(main())
hold.check()
assert session.stats().leases_lost == 0
hold.put(name + ".state", b"mine")
hold.unlock()
session.close()
"""


def test_the_lock_is_still_held_after_the_interpreter_was_busy_for_three_ttls(target: str, name: str) -> None:
    programs = [Program(BUSY, target, f"{name}/{n}", how) for n, how in enumerate(["C code", "a busy loop", "asyncio"])]
    for program in programs:
        assert program.end(60) == (0, "", "")


# ---- logging -----------------------------------------------------------------------------------


def lose_a_hold(etcd: Etcd, name: str) -> None:
    with etcdlock.connect(etcd.endpoint) as session:
        hold = session.mutex(name).lock()
        heard: list[str] = []
        hold.on_lost(heard.append)
        etcd.delete_keys(name)
        until(lambda: heard)


def test_the_loss_of_a_hold_is_logged_as_etcdlock(etcd: Etcd, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="etcdlock")
    lose_a_hold(etcd, name)
    until(lambda: [record for record in caplog.records if record.levelno == logging.WARNING])
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.name == "etcdlock" and name in record.getMessage() and "hold lost" in record.getMessage()


def test_the_level_comes_from_the_configuration_of_logging(etcd: Etcd, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="etcdlock")
    lose_a_hold(etcd, name)
    # Records come in order: the hold of this name was lost before, and its warning is not here.
    caplog.set_level(logging.DEBUG, logger="etcdlock")
    lose_a_hold(etcd, f"{name}/second")
    until(lambda: any("second" in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING))
    assert not [record for record in caplog.records if f'"{name}"' in record.getMessage() and "lost" in record.getMessage()]


SILENT = """
import sys, etcdlock
if sys.argv[3] == "imported": import logging
session = etcdlock.connect(sys.argv[1])
hold = session.mutex(sys.argv[2]).lock()
print("held", flush=True)
import threading
heard = threading.Event()
hold.on_lost(lambda reason: heard.set())
assert heard.wait(20)
session.close()
"""


@pytest.mark.parametrize("logging", ["imported", "not imported"])
def test_nothing_is_printed_without_a_configuration(etcd: Etcd, name: str, logging: str) -> None:
    program = Program(SILENT, etcd.endpoint, name, logging)
    assert program.says() == "held"
    etcd.delete_keys(name)
    assert program.end() == (0, "", "")


# ---- interpreters ------------------------------------------------------------------------------

SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
try:
    import etcdlock
except ImportError as error:
    print("refused:", error)
else:
    print("imported")
'''
{first}
sub = interpreters.create()
if hasattr(interpreters, "run_string"): interpreters.run_string(sub, code)
else: interpreters.exec(sub, code)
sys.stdout.flush()
interpreters.destroy(sub)
{then}
"""


@pytest.mark.parametrize("first", ["", "import etcdlock; etcdlock.connect('memory:').mutex('a').lock().unlock()"])
def test_a_sub_interpreter_is_refused_cleanly(first: str) -> None:
    then = "import etcdlock\nwith etcdlock.connect('memory:') as s, s.mutex('a'): print('works')"
    code, out, err = Program(SUBINTERPRETER.format(first=first, then=then)).end()
    assert (code, err) == (0, "") and "refused" in out
    if first:
        assert out.endswith("works\n")


def test_this_interpreter_s_threads_run_at_once() -> None:
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("this is not a free-threaded CPython")
    import etcdlock._native  # importing it has not switched the GIL on

    assert not sys._is_gil_enabled()
