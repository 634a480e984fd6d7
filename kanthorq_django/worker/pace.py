"""How fast a lane gets on: how many calls end in a second, and how long one usually takes."""

import time

QUICK = 50e-6  # seconds; a round trip to a database takes longer


class Throughput:
    """How many calls have ended within about the last second, so that as many were started."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._count = 0
        self._rate = 0

    def per_second(self, count: int) -> int:
        now = time.monotonic()
        elapsed, ended = now - self._since, count - self._count
        if elapsed < 1:
            return max(self._rate, ended)
        self._since, self._count, self._rate = now, count, int(ended / elapsed)
        return self._rate


class UsualDuration:
    """How long calls take of late; a lane begins with the opinion that they take long."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._seconds, self.is_quick = 20 * QUICK, False

    def has_slowed(self, seconds: float) -> bool:
        """Note how long a call took; tell whether they were quick until now."""
        # Cut off, for one in a hundred waits for the interpreter's lock.
        self._seconds += (min(seconds, 20 * QUICK) - self._seconds) / 64
        was_quick, self.is_quick = self.is_quick, self._seconds < QUICK
        return was_quick and not self.is_quick
