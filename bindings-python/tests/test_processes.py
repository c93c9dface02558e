"""What happens to a process: stopped (row 1), forked (row 28), ended in any state (row 29)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import etcdlock
from outside import Etcd, Program, Proxy, silent_server, until

# ---- row 1: stopped ----------------------------------------------------------------------------

STOPPED = """
import sys, etcdlock
session = etcdlock.connect(sys.argv[1], ttl=2)
hold = session.mutex(sys.argv[2]).lock()
print("held", hold.token, flush=True)
sys.stdin.readline()
held = hold.is_held()
try:
    hold.put(sys.argv[2] + ".state", b"late")
    written = "written"
except etcdlock.LockLost:
    written = "refused"
print(held, written, hold.remaining(), flush=True)
session.close()
"""


def test_a_holder_that_was_stopped_past_its_ttl_knows_at_its_first_call(etcd: Etcd, name: str) -> None:
    holder = Program(STOPPED, etcd.endpoint, name)
    _, token = holder.says().split()
    os.kill(holder.process.pid, signal.SIGSTOP)
    try:
        with etcdlock.connect(etcd.endpoint) as session, session.mutex(name).lock(timeout=60) as next_hold:
            assert next_hold.token > int(token), "a fenced resource refuses the old one"
            next_hold.put(f"{name}.state", b"mine")
            holder.tell("go on")
            os.kill(holder.process.pid, signal.SIGCONT)
            assert holder.says() == "False refused 0.0"
            assert next_hold.get(f"{name}.state") == b"mine"
    finally:
        os.kill(holder.process.pid, signal.SIGCONT)
    assert holder.end()[::2] == (0, "")


# ---- row 41: memory is short --------------------------------------------------------------------

SHORT_OF_MEMORY = """
import resource, sys, etcdlock
session = etcdlock.connect(sys.argv[1])
with session.mutex(sys.argv[2]).lock() as hold:
    large = bytes(300 << 20)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), used + (100 << 20)))
    try:
        hold.put(sys.argv[2] + ".state", large)
    except etcdlock.Invalid as error:
        print(error)
session.close()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is only limited where there is /proc")
def test_row_41_a_value_there_is_no_memory_for_is_an_error_and_no_abort(etcd: Etcd, name: str) -> None:
    command = [sys.executable, "-c", SHORT_OF_MEMORY, etcd.endpoint, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "314572800 bytes" in done.stdout, done


# ---- row 28: forked ----------------------------------------------------------------------------

FORKED = """
import os, sys, warnings, etcdlock
warnings.simplefilter("ignore", DeprecationWarning)  # CPython 3.12 on: threads and fork
target, name, how = sys.argv[1:]
session = etcdlock.connect(target, ttl=10)
mutex = session.mutex(name)

def child():
    assert not hold.is_held() and not mutex.is_held() and hold.remaining() == 0.0
    assert hold.loss == "the process was forked"
    calls = [hold.check, hold.unlock, mutex.lock, mutex.try_lock, mutex.unlock, mutex.acquire, mutex.release,
             session.close, lambda: session.mutex("x"), lambda: session.inspect("x"), lambda: hold.put("k", "v")]
    for call in calls:
        try:
            call()
        except etcdlock.Forked as error:
            assert "connect anew" in str(error)
        else:
            raise AssertionError(call)
    heard = []
    if target.startswith("memory:"):
        with etcdlock.connect(target).mutex(name).lock(timeout=20): pass  # the child's memory is its own
    else:
        with etcdlock.connect(target, ttl=5) as mine:
            assert mine.mutex(name).try_lock() is None, "the parent still holds it"
            with mine.mutex(name + ".child").lock(timeout=20) as other:
                other.put(name + ".said", b"hello")

def in_block():
    # Leaving the parent's with block in the child.
    try:
        with mutex:
            global hold
            pid = os.fork()
    except etcdlock.Forked:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

if how == "block":
    in_block()
else:
    hold = mutex.lock()
    pid = os.fork()
    if pid == 0:
        child()
        if how == "sys.exit":
            sys.exit(7)      # the whole interpreter ends, atexit handlers and all
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    hold.check()
    if not target.startswith("memory:"):
        assert hold.get(name + ".said") == b"hello"
    hold.unlock()
    with mutex: pass
session.close()
"""


@pytest.mark.parametrize("how", ["os._exit", "sys.exit", "block"])
def test_a_fork_leaves_the_lock_to_the_parent(target: str, name: str, how: str) -> None:
    for _ in range(5):
        assert Program(FORKED, target, name, how).end() == (0, "", "")


FORKED_BUSY = """
import os, signal, sys, threading, warnings, etcdlock
warnings.simplefilter("ignore", DeprecationWarning)
target, name = sys.argv[1:]
session = etcdlock.connect(target)
stop = False

def work(number):
    mutex = session.mutex(f"{name}.{number}")
    while not stop:
        with mutex as hold:
            hold.on_lost(print)

threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for thread in threads: thread.start()
for _ in range(100):
    pid = os.fork()
    if pid == 0:
        signal.alarm(40)
        with etcdlock.connect(target) as mine, mine.mutex(name).lock(timeout=30): pass
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
stop = True
for thread in threads: thread.join()
session.close()
"""


def test_a_fork_while_other_threads_lock_and_unlock_does_no_harm(target: str, name: str) -> None:
    code, _, err = Program(FORKED_BUSY, target, name).end(100)
    assert (code, err) == (0, "")


MULTIPROCESSING = """
import multiprocessing, sys, warnings, etcdlock
warnings.simplefilter("ignore", DeprecationWarning)

def work(target, name, file, rounds):
    with etcdlock.connect(target, ttl=10) as session:
        mutex = session.mutex(name)
        for _ in range(rounds):
            with mutex:
                count = int(open(file).read())
                open(file, "w").write(str(count + 1))

if __name__ == "__main__":
    how, target, name, file = sys.argv[1:]
    open(file, "w").write("0")
    context = multiprocessing.get_context(how)
    with etcdlock.connect(target) as session, session.mutex(name) as hold:
        workers = [context.Process(target=work, args=(target, name, file, 20)) for _ in range(3)]
        for worker in workers: worker.start()
        hold.check()
    for worker in workers: worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    print(open(file).read())
"""


@pytest.mark.parametrize("how", ["fork", "forkserver", "spawn"])
def test_multiprocessing_workers_exclude_each_other(etcd: Etcd, name: str, how: str, tmp_path: Any) -> None:
    if how not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no start method {how} on this system")
    # A file, because forkserver and spawn import the main module.
    script = tmp_path / "workers.py"
    script.write_text(MULTIPROCESSING)
    command = [sys.executable, str(script), how, etcd.endpoint, name, str(tmp_path / "count")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "60", "")
    assert etcd.keys(name) == []


# ---- row 29: ended -----------------------------------------------------------------------------

# Each says "ready" in its state, and ends with code 3 once told to.
STATES = {
    "holding": """
hold = mutex.lock()
ready(); sys.exit(3)
""",
    "inside a with block": """
with mutex:
    ready(); sys.exit(3)
""",
    "holding by acquire": """
mutex.acquire()
ready(); sys.exit(3)
""",
    "waiting in a daemon thread": """
hold = mutex.lock()
threading.Thread(target=session.mutex(name).lock, daemon=True).start()
time.sleep(0.02)
ready(); sys.exit(3)
""",
    "locking and unlocking in daemon threads": """
def work(n):
    mine = session.mutex(f"{name}/{n}")
    while True:
        with mine as hold:
            hold.on_lost(print)
for n in range(3):
    threading.Thread(target=work, args=(n,), daemon=True).start()
ready(); sys.exit(3)
""",
    "connecting in a daemon thread": """
threading.Thread(target=etcdlock.connect, args=(silent,), daemon=True).start()
hold = mutex.lock()
ready(); sys.exit(3)
""",
    "waiting, and a signal handler exits": """
hold = mutex.lock()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
threading.Thread(target=lambda: (ready(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
session.mutex(name).lock()
""",
    "holding and waiting in asyncio": """
async def main():
    async with session.mutex(name):
        tasks = [asyncio.create_task(_lock(session.mutex(name))) for _ in range(10)]
        await asyncio.sleep(0)
        ready(); sys.exit(3)
async def _lock(mutex): await mutex.lock()
session = etcdlock.aio.Session(session)
asyncio.run(main())
""",
    "waiting in an event loop in a daemon thread": """
async def main():
    await asyncio.gather(*(_lock() for _ in range(10)))
async def _lock():
    while True:
        async with asession.mutex(name): await asyncio.sleep(0)
asession = etcdlock.aio.Session(session)
threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
ready(); sys.exit(3)
""",
    "in a slow callback": """
hold = mutex.lock()
other = etcdlock.connect(target)
lost = other.mutex(name + "/other").lock()
entered = threading.Event()
lost.on_lost(lambda reason: (entered.set(), time.sleep(1000)))
other.close()
entered.wait()
ready(); sys.exit(3)
""",
    "with callbacks for a hundred holds, which are lost by the end itself": """
holds = [session.mutex(f"{name}/{n}").lock() for n in range(100)]
for hold in holds: hold.on_lost(print)
ready(); sys.exit(3)
""",
    "with everything logged": """
logging.basicConfig(level=1, stream=open(os.devnull, 'w'))
warnings.simplefilter('ignore')
hold = mutex.lock()
etcdlock.connect(target).mutex(name + "/other").lock().on_lost(print)
ready(); sys.exit(3)
""",
    "after the session was closed": """
hold = mutex.lock()
session.close()
ready(); sys.exit(3)
""",
    "in a forked child": """
hold = mutex.lock()
pid = os.fork()
if pid == 0:
    sys.exit(3)
os.waitpid(pid, 0)
ready(); sys.exit(3)
""",
    "holding, cut off from etcd": """
hold = mutex.lock()
print("cut", flush=True)
sys.stdin.readline()
ready(); sys.exit(3)
""",
}

BEGIN = """
import asyncio, logging, os, signal, sys, threading, time, warnings
import etcdlock
warnings.simplefilter("ignore", DeprecationWarning)
target, name, silent = sys.argv[1:]
def ready():
    print("ready", flush=True)
session = etcdlock.connect(target, ttl=3)
mutex = session.mutex(name)
"""


@pytest.mark.parametrize("where", ["etcd", "memory"])
@pytest.mark.parametrize("state", STATES)
def test_a_process_ends_cleanly_in_any_state_twenty_times(etcd: Etcd, name: str, state: str, where: str) -> None:
    if where == "memory" and "cut off" in state:
        pytest.skip("memory cannot be cut off")
    silent = silent_server()

    def once(number: int) -> float:
        mine = f"{name}/{number}"
        proxy = Proxy(etcd.endpoint) if "cut off" in state else None
        target = "memory:" if where == "memory" else proxy.endpoint if proxy else etcd.endpoint
        program = Program(BEGIN + STATES[state], target, mine, silent)
        if proxy:
            assert program.says() == "cut"
            proxy.is_cut = True
            program.tell("go on")
        while (line := program.says()) != "ready":
            assert line, program.end()
        start = time.monotonic()
        ended = program.end(60)
        took = time.monotonic() - start
        assert ended == (3, "", ""), f"{state}, exit {number}"
        until(lambda: etcd.keys(mine) == [])
        return took

    with ThreadPoolExecutor(4) as pool:
        took = sorted(pool.map(once, range(20)))
    print(f"20 exits {state}: median {took[10]:.2f} s, slowest {took[-1]:.2f} s")


def test_the_module_is_the_command(etcd: Etcd) -> None:
    import os
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "etcdlock", "run", "python-m", "--", "sh", "-c"]
    env = {**os.environ, "ETCDLOCK_ENDPOINTS": etcd.endpoint}
    done = subprocess.run([*command, "echo $ETCDLOCK_NAME; exit 3"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "python-m\n", "")
    script = 'trap "exit 9" TERM INT; echo ready; while :; do sleep 0.05; done'
    for sent in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen([*command, script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None and running.stdout.readline() == "ready\n"
            running.send_signal(sent)
            out, err = running.communicate(timeout=60)
            # The shell may say that its sleep was ended; Python must not say anything.
            assert (out, running.returncode) == ("", 9) and "Traceback" not in err
