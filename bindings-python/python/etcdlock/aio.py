"""The same for asyncio: sessions, mutexes and holds whose calls are awaited.

    import etcdlock

    async with etcdlock.aio.connect("127.0.0.1:2379") as session:
        async with session.mutex("/orders/42").lock(timeout=5) as hold:
            await hold.put("/orders/42/state", b"paid")

A session can be used by several event loops and threads at once. Cancelling a call cleans up: a
cancelled lock() leaves nothing behind, and one that is granted at that very moment is released.
Losing a hold cancels the body of its `async with` and surfaces there as LockLost.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Sequence
from os import PathLike
from types import CodeType, TracebackType
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar, cast

from . import _native
from ._errors import Error, LockLost, NotHeld
from ._native import Contender, Stats

__all__ = ["Acquisition", "Connecting", "Hold", "Mutex", "Session", "connect"]

_T = TypeVar("_T")
_Start = Callable[[Callable[[], object]], _native.Call]


async def _call(start: _Start) -> Any:
    """Starts a call of the native half, and waits for its result without blocking the loop."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    call = start(functools.partial(loop.call_soon_threadsafe, _settle, done))
    try:
        await done
    except BaseException:
        call.cancel()
        raise
    return call.result()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _nothing() -> None:
    pass


class _Awaitable(Generic[_T]):
    """What can be awaited, once, and warns if nobody does."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._used = False

    def _begin(self) -> None:
        if self._used:
            raise RuntimeError(f"this {self._what} was awaited before; call it again for another")
        self._used = True

    async def _run(self) -> _T:
        raise NotImplementedError

    def __await__(self) -> Generator[Any, None, _T]:
        self._begin()
        return self._run().__await__()

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(f"{self._what} was never awaited, so nothing was done", RuntimeWarning, stacklevel=2, source=self)


def connect(
    target: str | Sequence[str] | None = None,
    *,
    ttl: float | None = None,
    namespace: str | None = None,
    user: str | None = None,
    password: str | None = None,
    ca: str | PathLike[str] | None = None,
    cert: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
    server_name: str | None = None,
    owner: str | None = None,
    connect_timeout: float | None = None,
    max_hold: float | None = None,
) -> Connecting:
    """Connects to where locks live: await it for the Session, or use it in `async with`, which closes it.

    Arguments and exceptions are those of etcdlock.connect(); all times are in seconds.
    """
    return Connecting(locals())


class Connecting(_Awaitable["Session"]):
    """A connect() on its way: awaitable, and an async context manager."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__("connect()")
        self._arguments = arguments
        self._session: Session | None = None

    async def _run(self) -> Session:
        return Session(await _call(functools.partial(_native._connect, arguments=self._arguments)))

    async def __aenter__(self) -> Session:
        self._session = await self
        return self._session

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.__aexit__(exc_type, exc, traceback)


class _Unpicklable:
    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        what = type(self).__name__.lower()
        raise TypeError(
            f"an etcdlock {what} cannot be pickled or copied: it belongs to this process; "
            "pass the lock's name on and connect anew there"
        )


class Session(_Unpicklable):
    """A connection to where locks live, with one lease that is renewed in the background until closed.

    Made by connect(). If its lease is lost, its holds are lost, and it gets itself a new lease:
    waiters go on waiting, and new locks work.
    """

    def __init__(self, native: _native.Session) -> None:
        self._native = native

    def mutex(self, name: str, /) -> Mutex:
        """A mutex of this name. Local: nothing is sent. Raises Invalid for a bad name, and Closed."""
        return Mutex(self._native.mutex(name))

    async def inspect(self, name: str, /) -> list[Contender]:
        """Who holds the lock of this name and who waits for it, in order. At most 5 s; raises Unavailable or Denied."""
        return cast("list[Contender]", await _call(lambda wake: self._native._start_inspect(wake, name)))

    async def close(self, timeout: float = 5.0) -> None:
        """Releases all holds, revokes the lease and ends the session, within timeout seconds.

        Raises Unavailable without a confirmation in time; the lease then ends by itself within its
        TTL. Cancelling it only ends the wait. Closing twice is fine.
        """
        await _call(lambda wake: self._native._start_close(wake, timeout))

    @property
    def ttl(self) -> float:
        """The TTL that etcd granted, in seconds; it may be longer than what was asked for."""
        return self._native.ttl

    @property
    def lease_id(self) -> int | None:
        """The id of the lease, which changes when the session had to get a new one; None while it has none."""
        return self._native.lease_id

    def stats(self) -> Stats:
        """What the session has done so far."""
        return self._native.stats()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is GeneratorExit:
            # A dropped coroutine cannot wait; the session ends in the background.
            self._native._start_close(_nothing, 5.0)
            return
        try:
            await self.close()
        except Error:
            # The body's own exception wins.
            if exc_type is None:
                raise

    def __repr__(self) -> str:
        return f"<etcdlock.aio.Session {self._native!r}>"


class Mutex(_Unpicklable):
    """One lock name, seen by one session. Not re-entrant.

    Made by Session.mutex(). `async with mutex:` locks and unlocks, and gives the hold. Share it
    between tasks, loops and threads or not: each lock() waits its turn.
    """

    def __init__(self, native: _native.Mutex) -> None:
        self._native = native
        # The acquisitions of `async with mutex:`, by task.
        self._entered: dict[asyncio.Task[Any], list[Hold]] = {}

    def lock(self, timeout: float | None = None) -> Acquisition:
        """Waits its turn, through outages and re-elections, until held: await it, or use it in `async with`.

        timeout: seconds; None: for ever; 0: one try. Raises LockTimeout after it. Cancelling it, like
        the timeout, leaves nothing behind. Raises also Denied, Closed, Forked, and Unavailable if etcd
        refuses for a reason that waiting does not mend.
        """
        frame = sys._getframe(1)
        return Acquisition(self._native, timeout, (frame.f_code, frame.f_lineno))

    async def try_lock(self) -> Hold | None:
        """Takes the lock if it is free; None if somebody holds it. Never waits for other holders.

        Raises Unavailable without an answer within 5 s.
        """
        frame = sys._getframe(1)
        site = (frame.f_code, frame.f_lineno)
        native = await _call(lambda wake: self._native._start_try_lock(wake, site))
        return None if native is None else Hold(native)

    async def unlock(self) -> None:
        """Releases the hold that was acquired through this mutex.

        Cancelling it only ends the wait for etcd's confirmation, which is at most 5 s. Raises NotHeld;
        LockLost if the hold was lost before; Unavailable if it is released here, but not yet in etcd.
        """
        await _call(self._native._start_unlock)

    def locked(self) -> bool:
        """Whether the lock is held through this mutex; see is_held()."""
        return self._native.is_held()

    def is_held(self) -> bool:
        """Whether this mutex holds the lock, as far as can be known here. Local; False from the deadline on."""
        return self._native.is_held()

    def remaining(self) -> float:
        """Seconds for which the hold of this mutex is good without another renewal; 0.0 if it holds nothing."""
        return self._native.remaining()

    @property
    def token(self) -> int | None:
        """The fencing token of the hold of this mutex, until it is unlocked; None if there is none."""
        return self._native.token

    @property
    def name(self) -> str:
        """The name, with the session's namespace."""
        return self._native.name

    async def __aenter__(self) -> Hold:
        frame = sys._getframe(1)
        hold = await Acquisition(self._native, None, (frame.f_code, frame.f_lineno)).__aenter__()
        self._entered.setdefault(_this_task(), []).append(hold)
        return hold

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task = _this_task()
        holds = self._entered[task]
        hold = holds.pop()
        if not holds:
            del self._entered[task]
        await hold.__aexit__(exc_type, exc, traceback)

    def __repr__(self) -> str:
        return f"<etcdlock.aio.Mutex {self._native!r}>"


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("this must run inside a task")
    return task


# CPython 3.10 does not count the cancellations of a task.
if sys.version_info >= (3, 11):

    def _cancelling(task: asyncio.Task[Any]) -> int:
        return task.cancelling()

    def _uncancel(task: asyncio.Task[Any]) -> int:
        return task.uncancel()

else:

    def _cancelling(task: asyncio.Task[Any]) -> int:
        return 0

    def _uncancel(task: asyncio.Task[Any]) -> int:
        return 0


class Acquisition(_Awaitable["Hold"]):
    """A lock() on its way: awaitable, and an async context manager that unlocks."""

    def __init__(self, native: _native.Mutex, timeout: float | None, site: tuple[CodeType, int]) -> None:
        super().__init__("lock()")
        self._native = native
        self._timeout = timeout
        self._site = site
        self._hold: Hold | None = None

    async def _run(self) -> Hold:
        return Hold(await _call(lambda wake: self._native._start_lock(wake, self._timeout, self._site)))

    async def __aenter__(self) -> Hold:
        self._hold = await self
        return await self._hold.__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hold is not None:
            await self._hold.__aexit__(exc_type, exc, traceback)


class Hold(_Unpicklable):
    """One successful acquisition, from lock to unlock or loss.

    In `async with`, losing it cancels the body, and the block raises LockLost. Let the resource
    refuse old tokens, or write through put().
    """

    def __init__(self, native: _native.Hold) -> None:
        self._native = native
        self._waiters: list[asyncio.Future[str]] = []
        # The loops that have been promised to hear of a loss.
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._body: asyncio.Task[Any] | None = None
        self._cancelled_body = False
        self._cancelling = 0

    @property
    def token(self) -> int:
        """The fencing token: strictly larger than that of every earlier hold of this name."""
        return self._native.token

    @property
    def name(self) -> str:
        """The name of the lock, with the session's namespace."""
        return self._native.name

    def is_held(self) -> bool:
        """Whether the hold still owns the lock, as far as can be known here. Local; False from the deadline on."""
        return self._native.is_held()

    def remaining(self) -> float:
        """Seconds for which the hold is good without another renewal; 0.0 if it is lost or released."""
        return self._native.remaining()

    def check(self) -> None:
        """Returns if is_held(); else raises LockLost, NotHeld or Forked. Local."""
        self._native.check()

    @property
    def loss(self) -> str | None:
        """Why the hold was lost, as text; None if it was not. Local."""
        return self._native.loss

    async def lost(self) -> str:
        """Waits until the hold is lost, and returns the reason. Never ends if it is released first."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[str] = loop.create_future()
        self._waiters.append(waiter)
        try:
            self._listen(loop)
            return await waiter
        finally:
            self._waiters.remove(waiter)

    async def unlock(self) -> None:
        """Releases the lock.

        Cancelling it only ends the wait for etcd's confirmation, which is at most 5 s. Raises NotHeld if
        it was released before; LockLost if it was lost before; Unavailable if it is released here, but
        not yet in etcd.
        """
        await _call(self._native._start_unlock)

    async def put(self, key: bytes | str, value: bytes | str, /) -> None:
        """Writes key, only if this hold still owns the lock, atomically in etcd. At most 5 s.

        The key is used as given, without the namespace. Raises LockLost if nothing was written, and
        Unavailable if it may or may not have been.
        """
        await _call(lambda wake: self._native._start_put(wake, key, value))

    async def get(self, key: bytes | str, /) -> bytes | None:
        """Reads key, only if this hold still owns the lock; None if there is no such key. Raises as put()."""
        return cast("bytes | None", await _call(lambda wake: self._native._start_get(wake, key)))

    async def delete(self, key: bytes | str, /) -> None:
        """Deletes key, only if this hold still owns the lock. Raises as put()."""
        await _call(lambda wake: self._native._start_delete(wake, key))

    async def __aenter__(self) -> Hold:
        self._body = _this_task()
        self._cancelled_body = False
        self._cancelling = _cancelling(self._body)
        self._listen(asyncio.get_running_loop())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        raising = exc_type is not None
        if self._cancelled_body and body is not None:
            # Take our cancellation back; if the task was cancelled by others too, that goes on.
            others = _uncancel(body) > self._cancelling
            raising = others or (raising and exc_type is not asyncio.CancelledError)
        if exc_type is GeneratorExit:
            # A dropped coroutine cannot wait; the release goes on in the background.
            self._native._start_unlock(_nothing)
            return
        try:
            await self.unlock()
        except Error as error:
            # Unlocked in the body: that is where it was said whether it went well.
            quiet = isinstance(error, NotHeld) and not self._cancelled_body
            if not (raising or quiet):
                raise self._loss() or error from None

    def _loss(self) -> LockLost | None:
        if self._native.loss is None:
            return None
        text = f"the hold on {self.name!r} (token {self.token}) was lost: {self._native.loss}"
        return LockLost(f"{text}; another holder may be at work, so stop")

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._native.loss:
            # The loop may have heard of it before.
            loop.call_soon(self._hear_of_loss, loop)
        elif loop not in self._loops:
            self._loops.add(loop)
            # A weak reference: core keeps this as long as the hold, and would keep the hold with it.
            self._native._wake_when_lost(functools.partial(loop.call_soon_threadsafe, _hear_of_loss, weakref.ref(self), loop))

    def _hear_of_loss(self, loop: asyncio.AbstractEventLoop) -> None:
        reason = self._native.loss or "lost"
        for waiter in self._waiters:
            if waiter.get_loop() is loop and not waiter.done():
                waiter.set_result(reason)
        if self._body is not None and self._body.get_loop() is loop:
            self._cancelled_body = True
            self._body.cancel(f"the hold on {self.name!r} was lost: {reason}")

    def __repr__(self) -> str:
        return f"<etcdlock.aio.Hold {self._native!r}>"


def _hear_of_loss(hold: weakref.ref[Hold], loop: asyncio.AbstractEventLoop) -> None:
    alive = hold()
    if alive is not None:
        alive._hear_of_loss(loop)
