"""How many threads of a lane run handlers at a time: not all, where all would be slower.

Threads that wait for nothing but the interpreter's lock are switched to in vain each time that
another one lets go of it, if only to send a statement.
"""

import math
import time

QUICK = 50e-6  # seconds; a round trip to a database takes longer
BUSY = 0.85  # of a processor: the interpreter can use no more than one
NATIVE = 1.5  # from here on it is not the interpreter that is busy
LOAD_SECONDS = 0.1  # over which that is measured
SPARED_SECONDS = 10.0  # in which all run after few of them have left it idle
# Threads that share transactions: while one waits for the server, others have the interpreter.
SHARERS = 4


class Crew:
    """How many threads may run, as long as they get on; who finds that they do not says so."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = self.size = concurrency
        self._usual = _UsualDuration()
        self._load: _Load | None = None

    def share(self) -> None:
        """Expect handlers that share transactions."""
        self._load = _Load()

    def note(self, seconds: float, *, more_waits: bool) -> bool:
        """Note how long a call took; tell whether more threads may run from now on.

        ``more_waits``: there is something to do for them.
        """
        has_changed = self._usual.note(seconds)
        if self._load:
            has_changed |= self._load.measure(more_waits=more_waits)
        return has_changed and self._resize()

    def forget(self) -> None:
        """Let all threads run: those that did, did not get on."""
        self._usual.forget()
        if self._load:
            self._load.forget()
        self._resize()

    def _resize(self) -> bool:
        """Tell whether more may run than before."""
        before, self.size = self.size, self._concurrency
        if self._usual.is_quick:
            self.size = 1
        elif self._load and self._load.is_high:
            self.size = min(SHARERS, self._concurrency)
        return self.size > before


class _UsualDuration:
    """How long calls take of late; a lane begins with the opinion that they take long."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._seconds, self.is_quick = 20 * QUICK, False

    def note(self, seconds: float) -> bool:
        """Note how long a call took; tell whether that changes the opinion of them."""
        # Cut off, for one in a hundred waits for the interpreter's lock.
        self._seconds += (min(seconds, 20 * QUICK) - self._seconds) / 64
        was_quick, self.is_quick = self.is_quick, self._seconds < QUICK
        return was_quick != self.is_quick


class _Load:
    """Whether this process has kept the interpreter busy of late; at first it has not."""

    def __init__(self) -> None:
        self._spared_until = -math.inf
        self.forget()

    def forget(self) -> None:
        self._since, self._used, self.is_high = time.monotonic(), time.process_time(), False

    def measure(self, *, more_waits: bool) -> bool:
        """Look how busy it was, if it is time to; tell whether that has changed."""
        now = time.monotonic()
        if now < self._since + LOAD_SECONDS:
            return False
        used, was_high = time.process_time(), self.is_high
        is_busy = BUSY <= (used - self._used) / (now - self._since) < NATIVE
        self.is_high = is_busy and now >= self._spared_until
        if was_high and not is_busy and more_waits:
            self._spared_until = now + SPARED_SECONDS  # few wait for more than for its lock
        self._since, self._used = now, used
        return was_high != self.is_high
