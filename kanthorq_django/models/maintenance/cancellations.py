"""How cancellations went of late: how many, how long, and why their handlers failed."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta

from kanthorq_django import sql

LATELY = timedelta(days=1)
# What one consumer may cost: tasks that are looked at in each state, and histories that are read.
LOOKED_AT_MAX, HISTORIES_MAX = 5_000, 500
REASONS_MAX = 5
ERROR_SIZE = 160  # characters of a reason


@dataclass(slots=True, kw_only=True)
class Cancellations:
    """What ended within ``LATELY``; ``succeeded`` and ``failed`` count cancellation handlers.

    ``cancelled`` tasks include those that had no handler to run. ``median`` and ``longest``
    are from the request to the end. ``is_bounded`` says that there may have been more.
    ``failures`` are (error, count), the most frequent first; those of tasks that are being
    cancelled now are among them.
    """

    cancelled: int = 0
    succeeded: int = 0
    failed: int = 0
    median: timedelta | None = None
    longest: timedelta | None = None
    is_bounded: bool = False
    failures: list[tuple[str, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.cancelled or self.failed or self.failures)

    @property
    def success_rate(self) -> float | None:
        """Which part of the cancellation handlers succeeded at last; None if none ended."""
        ended = self.succeeded + self.failed
        return self.succeeded / ended if ended else None


def cancellations(consumer_ids: Collection[int], using: str) -> dict[int, Cancellations]:
    """Return how it went for each of ``consumer_ids``, in two statements of bounded cost."""
    found = {consumer_id: Cancellations() for consumer_id in consumer_ids}
    bounds = {"consumer_ids": list(found), "lately": LATELY, "limit": LOOKED_AT_MAX}
    for row in sql.rows(using, "cancellations", bounds):
        numbers = row._asdict()
        consumer_id = numbers.pop("consumer_id")
        found[consumer_id] = Cancellations(**numbers)
    limits = {"histories": HISTORIES_MAX, "reasons": REASONS_MAX, "error_size": ERROR_SIZE}
    for row in sql.rows(using, "cancellation_failures", bounds | limits):
        found[row.consumer_id].failures.append((row.error, row.count))
    return found
