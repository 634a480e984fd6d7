"""Retry policies: how long a failed attempt waits for the next one, and how many there are.

Chance is passed in where a test wants it, so every delay can be checked exactly.
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import timedelta

from kanthorq_django.domain.quoting import quoted

ATTEMPT_LIMIT = 32_767  # a smallint, as KanthorQ's attempt_max
WAIT_LIMIT = timedelta(days=3_650)  # added to now, it stays a moment that Python can read


@dataclass(frozen=True, kw_only=True)
class RetryPolicy(ABC):
    """What all policies share. ``attempt_max`` None leaves the limit to the consumer.

    ``jitter`` is a fraction: 0.1 draws each wait from 90 % to 110 %, so that tasks that
    failed together do not come back together. No wait is ever longer than ``longest``: one
    that would be is drawn from below it.

    Raises ValueError when a field is out of its range.
    """

    attempt_max: int | None = None
    longest: timedelta = timedelta(days=1)
    jitter: float = 0.1

    def __post_init__(self) -> None:
        if self.attempt_max is not None and not _is_count(self.attempt_max):
            raise ValueError(
                f"attempt_max must be 1 to {ATTEMPT_LIMIT}, not {quoted(self.attempt_max)}."
            )
        if not (_is_number(self.jitter) and 0 <= self.jitter <= 1):
            raise ValueError(f"jitter must be between 0 and 1, not {quoted(self.jitter)}.")
        _check_positive(longest=self.longest)
        check_delay("longest", self.longest)

    @abstractmethod
    def wait(self, attempt: int) -> timedelta:
        """Return the wait after ``attempt``, counted from 1, before jitter and limit."""

    def next_delay(self, attempt: int, *, chance: float | None = None) -> timedelta:
        """Return how long the attempt that follows ``attempt`` has to wait.

        ``attempt`` counts from 1; ``chance`` (0 to 1, drawn when None) places the wait
        within its jitter. Raises ValueError if ``attempt`` is below 1, and TypeError if ``wait()``
        returns no timedelta.
        """
        if attempt < 1:
            raise ValueError(f"attempt counts from 1, got {quoted(attempt)}.")
        drawn = random.random() if chance is None else chance  # noqa: S311  # not a secret
        try:
            wait = self._checked_wait(attempt)
            most = min(wait * (1 + self.jitter), self.longest)
        except OverflowError:
            wait = most = self.longest
        least = min(wait, self.longest) * (1 - self.jitter)
        return least + (most - least) * drawn

    def _checked_wait(self, attempt: int) -> timedelta:
        wait: object = self.wait(attempt)  # of a project's own class, whatever its annotation says
        if not isinstance(wait, timedelta):
            called = f"{type(self).__name__}.wait({attempt})"
            raise TypeError(f"{called} must return a timedelta, not {quoted(wait)}.")
        return wait


@dataclass(frozen=True, kw_only=True)
class Polynomial(RetryPolicy):
    """Wait ``attempt ** degree`` times ``base``: 1 s, 16 s, 81 s, 256 s, … as KanthorQ does."""

    degree: float = 4
    base: timedelta = timedelta(seconds=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(base=self.base)
        if not (_is_number(self.degree) and self.degree >= 0):
            raise ValueError(f"degree must be a number from zero on, not {quoted(self.degree)}.")

    def wait(self, attempt: int) -> timedelta:
        return self.base * math.pow(attempt, self.degree)


@dataclass(frozen=True, kw_only=True)
class Exponential(RetryPolicy):
    """Wait ``base`` times ``factor`` ** (attempt - 1): 1 s, 2 s, 4 s, …, at most ``longest``."""

    base: timedelta = timedelta(seconds=1)
    factor: float = 2
    longest: timedelta = timedelta(minutes=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(base=self.base)
        if not (_is_number(self.factor) and self.factor >= 1):
            raise ValueError(f"factor must be at least 1, got {quoted(self.factor)}.")

    def wait(self, attempt: int) -> timedelta:
        return self.base * math.pow(self.factor, attempt - 1)


@dataclass(frozen=True)
class Fixed(RetryPolicy):
    """Wait the same ``delay`` before every attempt, without jitter unless asked for."""

    delay: timedelta = timedelta(seconds=30)
    jitter: float = field(default=0, kw_only=True)
    longest: timedelta = field(default=WAIT_LIMIT, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_delay("delay", self.delay)
        if self.delay > self.longest:
            raise ValueError(f"delay is {self.delay}, but longest is {self.longest}.")

    def wait(self, attempt: int) -> timedelta:
        return self.delay


@dataclass(frozen=True, kw_only=True)
class Never(RetryPolicy):
    """One attempt; what fails is discarded."""

    attempt_max: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attempt_max != 1:
            raise ValueError(
                f"Never() makes one attempt, so its attempt_max cannot be "
                f"{quoted(self.attempt_max)}; use Fixed()."
            )

    def wait(self, attempt: int) -> timedelta:
        return timedelta(0)


def check_delay(name: str, delay: object) -> None:
    """Raise ValueError unless ``delay`` is a timedelta from zero to ten years."""
    if not isinstance(delay, timedelta) or not timedelta(0) <= delay <= WAIT_LIMIT:
        raise ValueError(
            f"{name} must be a timedelta from zero to {WAIT_LIMIT.days} days, not {quoted(delay)}."
        )


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= ATTEMPT_LIMIT


def _is_number(value: object) -> bool:
    """Tell whether ``value`` goes with floats; a Decimal does not."""
    return isinstance(value, int | float)


def _check_positive(**durations: object) -> None:
    for name, value in durations.items():
        if not isinstance(value, timedelta) or value <= timedelta(0):
            raise ValueError(f"{name} must be a timedelta above zero, not {quoted(value)}.")
