"""UUIDv7 (RFC 9562): known before the insert, sorted by time, monotonic within a process."""

import os
import struct
import threading
import time
from collections.abc import Iterator
from uuid import UUID, SafeUUID

_COUNTER_BITS = 42
_COUNTER_LIMIT = 1 << _COUNTER_BITS
_COUNTER_START_MASK = (_COUNTER_LIMIT >> 1) - 1  # the lower half: the other is left to count in
_VERSION_7 = 0x7 << 76 | 0b10 << 62  # and the variant
_RANDOM = struct.Struct("=QI")  # a counter to begin with, and a tail
_RANDOM_AT_ONCE = 256  # to ask the system for each alone would take longer than all the rest


class _Clock:
    """The last id's millisecond and counter; a counter keeps ids of one millisecond in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._millisecond = 0
        self._counter = 0
        self._random: Iterator[tuple[int, int]] = iter(())

    def tick(self) -> int:
        """Return the millisecond, the counter and 32 random bits, each in its place."""
        now = time.time_ns() // 1_000_000
        with self._lock:
            start, tail = next(self._random, None) or self._more_random()
            if now > self._millisecond:
                self._millisecond, self._counter = now, start & _COUNTER_START_MASK
            else:
                # Also when the wall clock steps back: order outranks the exact time.
                self._counter += 1
                if self._counter == _COUNTER_LIMIT:
                    self._millisecond += 1
                    self._counter = start & _COUNTER_START_MASK
            counter = self._counter
            return (
                (self._millisecond << 80)
                | (counter >> 30 << 64)
                | ((counter & 0x3FFF_FFFF) << 32)
                | tail
            )

    def _more_random(self) -> tuple[int, int]:
        self._random = _RANDOM.iter_unpack(os.urandom(_RANDOM.size * _RANDOM_AT_ONCE))
        return next(self._random)


_clock = _Clock()
_set = object.__setattr__  # UUIDs are immutable for everybody else
_UNKNOWN = SafeUUID.unknown  # to look up a member of an enumeration takes longer than a lock


def uuid7() -> UUID:
    """Return a new UUIDv7 that sorts after every one this process made before."""
    made = UUID.__new__(UUID)  # UUID() asks first in which of six ways
    _set(made, "int", _clock.tick() | _VERSION_7)
    _set(made, "is_safe", _UNKNOWN)
    return made


def _renew_clock() -> None:
    """A forked child would otherwise count on from its parent's counter."""
    global _clock  # noqa: PLW0603  # its lock may have been held when the process forked
    _clock = _Clock()


os.register_at_fork(after_in_child=_renew_clock)
