"""UUIDv7 (RFC 9562): known before the insert, sorted by time, monotonic within a process."""

import os
import threading
import time
from array import array
from collections.abc import Iterator
from uuid import UUID, SafeUUID

# From the left: 48 bits of milliseconds, 4 of the version, 12 random ones; 2 of the variant, 30 of
# a counter, 32 random ones.
_VERSION_7 = 0x7 << 76 | 0b10 << 62
_STEP = 1 << 32
_COUNTER_BITS = 30
_COUNTER_MAX = (1 << _COUNTER_BITS) - 1
_RANDOM_AT_ONCE = 1024  # numbers; to ask the system for each would take longer than all the rest


class _Clock:
    """The last id but for its random end; a counter keeps ids of one millisecond in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._millisecond = 0
        self._last = self._highest = 0
        self._random: Iterator[int] = iter(())

    def tick(self) -> int:
        """Return the next id as an integer."""
        now = time.time_ns() // 1_000_000
        with self._lock:
            self._last += _STEP
            if now > self._millisecond:
                self._begin(now)
            elif self._last > self._highest:
                # Also when the wall clock steps back: order outranks the exact time.
                self._begin(self._millisecond + 1)
            return self._last | (next(self._random, None) or self._more_random())

    def _begin(self, millisecond: int) -> None:
        """Count from a random number in the lower half: the other is left to count in."""
        salt, start = self._more_random() >> 20, self._more_random() >> 3
        base = millisecond << 80 | salt << 64 | _VERSION_7
        self._millisecond = millisecond
        self._last, self._highest = base | start * _STEP, base | _COUNTER_MAX * _STEP

    def _more_random(self) -> int:
        """Return 32 random bits."""
        number = next(self._random, None)
        if number is None:
            self._random = iter(array("I", os.urandom(4 * _RANDOM_AT_ONCE)))
            number = next(self._random)
        return number


_clock = _Clock()
# Past the constructor, which first finds out which of six arguments it was given, and past what
# keeps UUIDs from being changed.
_set_int, _set_is_safe = vars(UUID)["int"].__set__, vars(UUID)["is_safe"].__set__
_UNKNOWN = SafeUUID.unknown  # to look up a member of an enumeration takes longer than a lock


def uuid7() -> UUID:
    """Return a new UUIDv7 that sorts after every one this process made before."""
    made = UUID.__new__(UUID)
    _set_int(made, _clock.tick())
    _set_is_safe(made, _UNKNOWN)
    return made


def _renew_clock() -> None:
    """A forked child would otherwise count on from its parent's counter."""
    global _clock  # noqa: PLW0603  # its lock may have been held when the process forked
    _clock = _Clock()


os.register_at_fork(after_in_child=_renew_clock)
