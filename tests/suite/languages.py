"""The languages: how a driver is built and started, and how each call is spelled. A new language is one more entry."""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = ROOT / "tests/suite/drivers"
C_DRIVER = ROOT / "target/ffi-c/driver"
UNIFFI = ROOT / "target/uniffi"
VENV_PYTHON = ROOT / ".venv/bin/python"

# The rows of docs/parity.md: a call of the protocol, and what it is.
CALLS = {
    "connect": "open a session",
    "mutex": "name a lock",
    "lock": "wait for the lock, at most so long",
    "cancel": "give up waiting",
    "try_lock": "take it if it is free",
    "unlock": "release it",
    "state": "is it held, how long for sure, its token",
    "check": "the same as an error that says why",
    "lost": "hear of the loss",
    "put": "guarded write",
    "get": "guarded read",
    "delete": "guarded delete",
    "inspect": "who holds, who waits",
    "stats": "counters",
    "close": "end the session",
}


@dataclass
class Language:
    title: str
    command: list[str]
    # Shell lines, run in the project's folder. They must be quick when there is nothing to do.
    build: list[str]
    tools: list[str]
    spelled: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        lacking = [tool for tool in self.tools if not shutil.which(tool)]
        return f"{', '.join(lacking)} is not installed" if lacking else None

    def make(self) -> None:
        for line in self.build:
            shell(line)


def shell(line: str) -> None:
    """Runs a line in the project's folder; what it prints shows only if it fails."""
    done = subprocess.run(line, shell=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{line}: failed\n{done.stdout}")


# -D_GNU_SOURCE for CLOCK_BOOTTIME and strndup.
C_BUILD = (
    f"gcc -std=c11 -D_GNU_SOURCE -O1 -Wall -Wextra -Werror -Iffi-c/include {DRIVERS}/driver.c "
    f"-Ltarget/ffi-c -Wl,-rpath,{ROOT}/target/ffi-c -letcdlock -pthread -o {C_DRIVER}"
)

LANGUAGES = {
    "rust": Language(
        "Rust",
        [str(ROOT / "target/release/examples/driver")],
        ["cargo build --release --locked --quiet -p etcdlock --example driver"],
        ["cargo"],
        {
            "connect": "Session::connect",
            "mutex": "session.mutex",
            "lock": "mutex.lock, .lock_timeout",
            "cancel": "Pending::cancel, or drop",
            "try_lock": "mutex.try_lock",
            "unlock": "hold.unlock, mutex.unlock, or drop",
            "state": "hold.is_held, .remaining, .token",
            "check": "hold.check",
            "lost": "hold.lost().await, .on_lost",
            "put": "hold.put",
            "get": "hold.get",
            "delete": "hold.delete",
            "inspect": "session.inspect",
            "stats": "session.stats",
            "close": "session.close",
        },
    ),
    "c": Language(
        "C",
        [str(C_DRIVER)],
        ["make --no-print-directory -C ffi-c lib", C_BUILD],
        ["gcc", "make"],
        {
            "connect": "etcdlock_session_open",
            "mutex": "etcdlock_mutex_new",
            "lock": "etcdlock_mutex_lock, …_lock_start",
            "cancel": "etcdlock_op_cancel",
            "try_lock": "etcdlock_mutex_try_lock",
            "unlock": "etcdlock_mutex_unlock, …_unlock_start",
            "state": "etcdlock_mutex_is_held, …_remaining_ms, …_token",
            "check": "etcdlock_mutex_check",
            "lost": "etcdlock_mutex_on_lost",
            "put": "etcdlock_mutex_put",
            "get": "etcdlock_mutex_get",
            "delete": "etcdlock_mutex_delete",
            "inspect": "etcdlock_session_inspect",
            "stats": "etcdlock_session_stats",
            "close": "etcdlock_session_close",
        },
    ),
    "python": Language(
        "Python",
        [str(VENV_PYTHON), str(DRIVERS / "driver.py")],
        ["make --no-print-directory -C bindings-python install"],
        ["python3"],
        {
            "connect": "etcdlock.connect",
            "mutex": "session.mutex",
            "lock": "mutex.lock, .acquire, with mutex",
            "try_lock": "mutex.try_lock",
            "unlock": "hold.unlock, mutex.unlock, .release",
            "state": "hold.is_held, .remaining, .token",
            "check": "hold.check",
            "lost": "hold.on_lost, LockLost",
            "put": "hold.put",
            "get": "hold.get",
            "delete": "hold.delete",
            "inspect": "session.inspect",
            "stats": "session.stats",
            "close": "session.close, with session",
        },
    ),
    "asyncio": Language(
        "Python, asyncio",
        [str(VENV_PYTHON), str(DRIVERS / "driver_asyncio.py")],
        [],
        ["python3"],
        {
            "connect": "await aio.connect",
            "mutex": "session.mutex",
            "lock": "await mutex.lock, async with",
            "cancel": "task.cancel",
            "try_lock": "await mutex.try_lock",
            "unlock": "await hold.unlock, mutex.unlock",
            "state": "hold.is_held, .remaining, .token",
            "check": "hold.check",
            "lost": "await hold.lost, LockLost",
            "put": "await hold.put",
            "get": "await hold.get",
            "delete": "await hold.delete",
            "inspect": "await session.inspect",
            "stats": "session.stats",
            "close": "await session.close, async with",
        },
    ),
    "node": Language(
        "Node",
        ["node", str(DRIVERS / "driver.mjs")],
        ["make --no-print-directory -C bindings-node build"],
        ["node", "make"],
        {
            "connect": "await connect",
            "mutex": "session.mutex",
            "lock": "await mutex.lock, .withLock",
            "cancel": "AbortSignal",
            "try_lock": "await mutex.tryLock",
            "unlock": "await hold.unlock, mutex.unlock, await using",
            "state": "hold.isHeld, .remaining, .token",
            "check": "hold.check",
            "lost": "hold.signal",
            "put": "await hold.put",
            "get": "await hold.get",
            "delete": "await hold.delete",
            "inspect": "await session.inspect",
            "stats": "session.stats",
            "close": "await session.close, await using",
        },
    ),
    "jvm": Language(
        "Java",
        ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{UNIFFI}/driver:{UNIFFI}/jvm/*:{UNIFFI}/lib/*", "Driver"],
        [
            "make --no-print-directory -C bindings-uniffi jvm",
            f"javac -cp '{UNIFFI}/jvm/*:{UNIFFI}/lib/*' -d {UNIFFI}/driver {DRIVERS}/Driver.java",
        ],
        ["javac", "mvn", "make"],
        {
            "connect": "Session.connect, .connectAsync",
            "mutex": "session.mutex",
            "lock": "mutex.lock, .lockAsync, .asLock; Kotlin withLock",
            "cancel": "future.cancel, Thread.interrupt",
            "try_lock": "mutex.tryLock",
            "unlock": "hold.unlock, mutex.unlock, try (hold)",
            "state": "hold.isHeld, .remaining, .getToken",
            "check": "hold.check",
            "lost": "hold.onLost",
            "put": "hold.put",
            "get": "hold.get",
            "delete": "hold.delete",
            "inspect": "session.inspect",
            "stats": "session.stats",
            "close": "session.close, try (session)",
        },
    ),
    "ruby": Language(
        "Ruby",
        ["ruby", "-I", f"{UNIFFI}/gem/lib", str(DRIVERS / "driver.rb")],
        ["make --no-print-directory -C bindings-uniffi ruby"],
        ["ruby", "make"],
        {
            "connect": "Etcdlock.connect",
            "mutex": "session.mutex",
            "lock": "mutex.lock, .synchronize",
            "cancel": "Thread#raise, Timeout",
            "try_lock": "mutex.try_lock",
            "unlock": "hold.unlock, mutex.unlock",
            "state": "hold.held?, .remaining, .token",
            "check": "hold.check",
            "lost": "hold.on_lost",
            "put": "hold.put",
            "get": "hold.get",
            "delete": "hold.delete",
            "inspect": "session.contenders",
            "stats": "session.stats",
            "close": "session.close, connect { }",
        },
    ),
}
