"""How many calls of a lane end in a second."""

import time


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
