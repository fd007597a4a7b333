"""Handles Ctrl-C, SIGTERM and SIGHUP (a closed terminal), and defers them while a started program is being recorded."""

import contextlib
import signal

_held = 0
_pending = False


def _handle(_number, _frame):
    global _pending
    if _held:
        _pending = True
    else:
        raise KeyboardInterrupt


def install() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt.

    The handler of SIGINT is set explicitly, because shells make background jobs ignore SIGINT.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _handle)


def pending() -> bool:
    """Whether a signal arrived while signals were deferred."""
    return _pending


@contextlib.contextmanager
def held_back():
    """Defers signals within a `with` block. The end of the outermost block raises KeyboardInterrupt if a signal has arrived."""
    global _held, _pending
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if _pending and not _held:
        _pending = False
        raise KeyboardInterrupt
