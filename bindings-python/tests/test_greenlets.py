"""In a program that gevent or eventlet has patched: waiting gives way to the other greenlets, one of whom may hold the lock."""

import importlib.util
import subprocess
import sys

import pytest

PATCH = {
    "gevent": "from gevent import monkey; monkey.patch_all(); import gevent\n",
    "gevent, but not threads": "from gevent import monkey; monkey.patch_all(thread=False); import gevent\n",
    "eventlet": """
import eventlet; eventlet.monkey_patch()
class gevent:
    spawn = staticmethod(eventlet.spawn)
    Timeout = eventlet.Timeout
    joinall = staticmethod(lambda all: [one.wait() for one in all])
""",
}
PROGRAM = """
import logging, sys, threading, time
import etcdlock
logging.basicConfig(level=logging.DEBUG)
session = etcdlock.connect(sys.argv[1], ttl=5)
other = etcdlock.connect(sys.argv[1].replace("127.0.0.1", "localhost"), ttl=5)
order = []

def work(session, n):
    # More than any pool of threads has.
    with session.mutex("greenlets").lock():
        order.append(("in", n))
        time.sleep(0.02)
        order.append(("out", n))

gevent.joinall([gevent.spawn(work, (session, other)[n % 2], n) for n in range(30)])
assert len(order) == 60 and all(order[i][1] == order[i + 1][1] for i in range(0, 60, 2)), order

hold = session.mutex("held").lock()
told = []
hold.on_lost(told.append)
for mutex in (session.mutex("held"), other.mutex("held")):
    try:
        with gevent.Timeout(0.2):
            mutex.lock()
    except gevent.Timeout:
        pass
    else:
        sys.exit("it was not interrupted")
    try:
        mutex.lock(timeout=0.1)
    except etcdlock.LockTimeout:
        pass
until = time.monotonic() + 20
while len(session.inspect("held")) > 1 and time.monotonic() < until:
    time.sleep(0.01)
assert len(session.inspect("held")) == 1, session.inspect("held")
session.close()
while not told and time.monotonic() < until:
    time.sleep(0.01)
assert told, "nothing was told of the loss"
other.close()
print("done")
"""


@pytest.mark.parametrize("patch", PATCH)
def test_row_51_greenlets_give_way_to_each_other(etcd, patch):
    if importlib.util.find_spec(patch.split(",")[0]) is None:
        pytest.skip(f"{patch} is not installed")
    command = [sys.executable, "-W", "ignore", "-c", PATCH[patch] + PROGRAM, etcd.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


FORKING = """
import os, sys, time
import etcdlock
session = etcdlock.connect(sys.argv[1], ttl=5)
hold = session.mutex("forked").lock()
parent, told = os.getpid(), []

def waits():
    try:
        session.mutex("forked").lock()
        told.append("held")
    except etcdlock.Error as error:
        told.append(type(error).__name__)

waiting = gevent.spawn(waits)
time.sleep(0.3)
child = os.fork()
if child == 0:
    until = time.monotonic() + 20
    while not told and time.monotonic() < until:
        time.sleep(0.05)
    print(told, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
hold.unlock()
gevent.joinall([waiting])
print(status, told)
"""


def test_row_51_a_greenlet_that_waited_when_its_process_forked_is_told_in_the_child(etcd):
    if importlib.util.find_spec("gevent") is None:
        pytest.skip("gevent is not installed")
    command = [sys.executable, "-W", "ignore", "-c", PATCH["gevent"] + FORKING, etcd.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "['Forked']\n0 ['held']\n"), done.stderr
