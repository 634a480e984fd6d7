"""UUIDv7 (RFC 9562): known before the insert, sorted by time, monotonic within a process."""

import os
import secrets
import threading
import time
from uuid import UUID

_COUNTER_BITS = 42
_COUNTER_LIMIT = 1 << _COUNTER_BITS


class _Clock:
    """The last id's millisecond and counter; a counter keeps ids of one millisecond in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._millisecond = 0
        self._counter = 0

    def tick(self) -> tuple[int, int]:
        now = time.time_ns() // 1_000_000
        with self._lock:
            if now > self._millisecond:
                self._millisecond, self._counter = now, secrets.randbits(_COUNTER_BITS - 1)
            else:
                # Also when the wall clock steps back: order outranks the exact time.
                self._counter += 1
                if self._counter == _COUNTER_LIMIT:
                    self._millisecond += 1
                    self._counter = secrets.randbits(_COUNTER_BITS - 1)
            return self._millisecond, self._counter


_clock = _Clock()


def uuid7() -> UUID:
    """Return a new UUIDv7 that sorts after every one this process made before."""
    millisecond, counter = _clock.tick()
    return UUID(
        int=(millisecond << 80)
        | (0x7 << 76)
        | (counter >> 30 << 64)
        | (0b10 << 62)
        | ((counter & 0x3FFF_FFFF) << 32)
        | secrets.randbits(32)
    )


def _renew_clock() -> None:
    """A forked child would otherwise count on from its parent's counter."""
    global _clock  # noqa: PLW0603  # its lock may have been held when the process forked
    _clock = _Clock()


os.register_at_fork(after_in_child=_renew_clock)
