"""The thread that logs what the native half has to say, and calls the callbacks of Hold.on_lost().

It is a plain Python thread, so that the interpreter can end while it is in somebody's slow callback. A thread it is also where
gevent or eventlet make greenlets of what else is started: it waits in native code, which never gives way to another greenlet.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable

from . import _native


def start() -> None:
    """Starts the thread, once per process."""
    _original_start()(_run, ())


def _original_start() -> Callable[..., object]:
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("_thread"):
        start: Callable[..., object] = gevent.get_original("_thread", "start_new_thread")
        return start
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        start = eventlet.original("_thread").start_new_thread
        return start
    return _thread.start_new_thread


def _run() -> None:
    while True:
        level, callback, text = _native._next_event()
        try:
            if level is not None:
                log(level, text)
            elif callback is not None:
                callback(text)
        except BaseException:
            import threading

            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        del callback


def log(level: int, text: str) -> None:
    """Hands a record to logging. A program that never imported logging does not want it."""
    if "logging" not in sys.modules:
        return
    # Not what sys.modules has: another thread may be in the middle of importing it. This waits for that.
    import logging

    logger = logging.getLogger("etcdlock")
    if not any(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        # Without any handler logging would print warnings itself.
        logger.addHandler(logging.NullHandler())
    logger.log(level, "%s", text)
