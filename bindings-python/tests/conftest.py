"""Fixtures of the suite. It runs against the etcd of $ETCDLOCK_ENDPOINTS (`make test` starts one) and in memory."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import etcdlock
from outside import Etcd

_numbers = itertools.count(1)

# Whoever runs tests in the background may have them ignore Ctrl-C, and the programs they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)



def _etcd_of_this_worker() -> None:
    """Side by side each worker has an etcd of its own: some tests count what is there."""
    rig = Path(__file__).parents[2] / "target/release/etcdlock-rig"
    process = subprocess.Popen([str(rig)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    os.environ["ETCDLOCK_ENDPOINTS"] = process.stdout.readline().strip()
    # It ends with its standard input.
    atexit.register(process.communicate)


if "PYTEST_XDIST_WORKER" in os.environ:
    _etcd_of_this_worker()


@pytest.fixture(scope="session")
def etcd() -> Etcd:
    endpoints = os.environ.get("ETCDLOCK_ENDPOINTS")
    if not endpoints:
        pytest.fail("$ETCDLOCK_ENDPOINTS is not set: run `make test`, which starts an etcd")
    return Etcd(endpoints)


@pytest.fixture(params=["etcd", "memory"])
def target(request: pytest.FixtureRequest) -> str:
    """Where locks live: the test runs once for each."""
    if request.param == "memory":
        return f"memory:{request.node.name}"
    etcd: Etcd = request.getfixturevalue("etcd")
    return etcd.endpoint


@pytest.fixture
def name() -> str:
    """A lock name that nothing else uses."""
    return f"/python/{os.getpid()}/{next(_numbers)}"


@pytest.fixture
def session(target: str) -> Iterator[etcdlock.Session]:
    with etcdlock.connect(target, ttl=10) as session:
        yield session
