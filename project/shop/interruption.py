"""Being asked to end: a signal is noted, and obeyed where nothing can be left behind.

An exception out of a signal handler could come between the start of a process and the note of who
has to stop it.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK = 0.05  # seconds until a signal is obeyed, at most


class Interrupted(Exception):
    """Somebody wants this to end."""


class _Request:
    """Whether somebody has asked. A plain attribute: the lock of an Event may just be held."""

    is_made = False


_request = _Request()


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Let ``rest()`` raise Interrupted after a signal; a second one interrupts whatever is done."""
    former = {number: signal.signal(number, _note) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _request.is_made = False


def rest(seconds: float) -> None:
    """Sleep. Raises Interrupted as soon as somebody has asked for the end."""
    until = time.monotonic() + seconds
    while not _request.is_made:
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(TICK, left))
    raise Interrupted


def _note(number: int, frame: FrameType | None) -> None:
    if _request.is_made:
        signal.default_int_handler(number, frame)
    _request.is_made = True
