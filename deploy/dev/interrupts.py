"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal), which may come at any moment, also between start and record."""

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
    """From now on each of these signals raises KeyboardInterrupt.

    Set explicitly: a shell starts its background jobs with SIGINT ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _handle)


def pending() -> bool:
    """Whether a signal came while they were held back."""
    return _pending


@contextlib.contextmanager
def held_back():
    """Within this block signals are only noted; the outermost block raises what came, when it ends."""
    global _held, _pending
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if _pending and not _held:
        _pending = False
        raise KeyboardInterrupt
