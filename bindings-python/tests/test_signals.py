"""Ctrl-C and other signals in a waiting call: row 30 of the safety model."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

import etcdlock
from outside import silent_server, until


def interrupt_after(seconds: float, number: int = signal.SIGINT) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    return timer


def test_fifty_interrupts_at_random_moments_leave_nothing(target: str, name: str) -> None:
    dice = random.Random(30)
    with etcdlock.connect(target) as session, etcdlock.connect(target) as other:
        mutex = session.mutex(name)

        def acquire() -> None:
            mutex.acquire()

        def lock() -> None:
            with mutex.lock(timeout=60):
                pytest.fail("entered")

        def enter() -> None:
            with mutex:
                pytest.fail("entered")

        slowest = 0.0
        for round in range(50):
            with other.mutex(name):
                after = 0.002 + dice.random() * 0.12
                timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
                start = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    timer.start()
                    (acquire, lock, enter)[round % 3]()
                slowest = max(slowest, time.monotonic() - start - after)
                timer.join()
            assert not mutex.is_held()
        print(f"slowest of 50: {slowest * 1000:.0f} ms")
        assert slowest < 10
        with mutex.lock(timeout=20):
            pass
        until(lambda: not session.inspect(name))


def test_interrupts_around_the_grant_leave_the_lock_held_or_free_but_never_lost_track_of(target: str, name: str) -> None:
    dice = random.Random(31)
    with etcdlock.connect(target) as session:
        mutex = session.mutex(name)
        interrupted = 0
        for _ in range(50):
            timer = threading.Timer(0.001 + dice.random() * 0.004, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                while True:
                    with mutex:
                        pass
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            assert not mutex.is_held()
        assert interrupted == 50
        with session.mutex(name).lock(timeout=20):
            pass


def test_other_handlers_run_while_a_lock_waits(target: str, name: str) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with etcdlock.connect(target) as session, session.mutex(name):
            timer = interrupt_after(0.05, signal.SIGUSR1)
            with pytest.raises(etcdlock.LockTimeout):
                session.mutex(name).lock(timeout=0.5)
            assert seen == [signal.SIGUSR1]
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_exception_from_a_handler_ends_the_wait(target: str, name: str) -> None:
    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with etcdlock.connect(target) as session, session.mutex(name):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Alarm):
                session.mutex(name).lock()
            assert len(session.inspect(name)) == 1
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_waiting_connect_is_interrupted_too() -> None:
    timer = interrupt_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        etcdlock.connect(silent_server(), connect_timeout=60)
    timer.join()
