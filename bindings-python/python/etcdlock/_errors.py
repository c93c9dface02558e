"""The exceptions. Import them from etcdlock."""

from __future__ import annotations

from typing import ClassVar


class Error(Exception):
    """Every exception of etcdlock. The message says what happened, to which name and target, and what to do."""

    code: ClassVar[int] = 0
    """The number of the kind, the same in every language."""
    kind: ClassVar[str] = ""
    """The name of the kind, the same in every language, such as "TIMEOUT"."""


class LockTimeout(Error, TimeoutError):
    """The time given to lock() ran out before the lock was free. Nothing is left behind."""

    code = 1
    kind = "TIMEOUT"


class LockBusy(Error):
    """Somebody else holds the lock. In Python try_lock() returns None instead."""

    code = 2
    kind = "BUSY"


class LockLost(Error):
    """The hold was lost before the call. Another holder may be at work, so stop."""

    code = 3
    kind = "LOST"


class NotHeld(Error, RuntimeError):
    """There is nothing to release."""

    code = 4
    kind = "NOT_HELD"


class Cancelled(Error):
    """The call was cancelled. (A cancelled asyncio task gets asyncio.CancelledError, as always.)"""

    code = 5
    kind = "CANCELLED"


class Unavailable(Error, ConnectionError):
    """The target could not be reached in time."""

    code = 6
    kind = "UNAVAILABLE"


class Denied(Error, PermissionError):
    """The target refused the credentials or the permission."""

    code = 7
    kind = "DENIED"


class Invalid(Error, ValueError):
    """An argument breaks a rule; the message names the value and the rule."""

    code = 8
    kind = "INVALID"


class Closed(Error, RuntimeError):
    """The session has been closed."""

    code = 9
    kind = "CLOSED"


class Forked(Error, RuntimeError):
    """The session was made before fork() and belongs to the parent process. Connect anew in the child."""

    code = 10
    kind = "FORKED"


class Deadlock(Error, RuntimeError):
    """A blocking call on a thread of the library's own could never return, so it is refused."""

    code = 11
    kind = "DEADLOCK"


class Internal(Error, RuntimeError):
    """A defect in etcdlock. Please report it."""

    code = 12
    kind = "INTERNAL"


BY_CODE: tuple[type[Error], ...] = (
    LockTimeout,
    LockBusy,
    LockLost,
    NotHeld,
    Cancelled,
    Unavailable,
    Denied,
    Invalid,
    Closed,
    Forked,
    Deadlock,
    Internal,
)

for _class in BY_CODE:
    # Where users import them from.
    _class.__module__ = "etcdlock"
Error.__module__ = "etcdlock"
