"""How a handler may end its task by raising: later, uncounted, or never again."""

from datetime import timedelta
from typing import Any

from kanthorq_django.domain.retry import check_delay


class Verdict(Exception):
    """Base of what a handler raises to end its task in a way of its own."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Retry(Verdict):
    """Try again after ``after`` instead of the policy's delay; counted as an attempt."""

    def __init__(self, after: timedelta, reason: str = "The handler asked for a retry.") -> None:
        check_delay("after", after)
        super().__init__(reason)
        self.after = after

    def __reduce__(self) -> Any:
        return type(self), (self.after, self.reason), self.__dict__


class Snooze(Verdict):
    """Run again after ``delay``; this attempt is not counted and is no error."""

    def __init__(self, delay: timedelta) -> None:
        check_delay("delay", delay)
        super().__init__(f"Snoozed for {delay}.")
        self.delay = delay

    def __reduce__(self) -> Any:
        return type(self), (self.delay,), self.__dict__


class Discard(Verdict):
    """Never try again: the task is discarded with ``reason``.

    Raised for several messages of a batch, it has each handled alone next, to tell for itself.
    """

    def __init__(self, reason: str = "The handler discarded the task.") -> None:
        super().__init__(reason)
