"""How many tasks a consumer has in each state, at a price that does not grow with the table."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from kanthorq_django import sql
from kanthorq_django.admin.display import Estimate, Minimum
from kanthorq_django.admin.paginator import estimate_rows
from kanthorq_django.domain.states import CLAIMABLE, FINAL, TaskState
from kanthorq_django.models import Task

COUNTED_MAX = 10_000  # tasks of a consumer that are counted in a state, or while claimable
SAMPLED = 100_000  # tasks among which the completed ones are counted
ALL = 100.0  # percent


@dataclass(slots=True)
class Tally:
    """A consumer's tasks by state, without states that have none; ``stuck`` ones run too.

    A number may be a Minimum, and that of completed tasks an Estimate.
    """

    counts: dict[TaskState, int] = field(default_factory=dict)
    stuck: int = 0

    @property
    def open(self) -> int:
        """How many tasks are not final; a Minimum where one of these numbers is."""
        counts = [count for state, count in self.counts.items() if state not in FINAL]
        is_minimum = any(isinstance(count, Minimum) for count in counts)
        return (Minimum if is_minimum else int)(sum(counts))

    def add(self, row: Any, *, is_cut: bool, is_sampled: bool) -> None:
        """Take over a row of ``tally_tasks``."""
        if row.state == TaskState.COMPLETED:
            self.counts[TaskState.COMPLETED] = (Estimate if is_sampled else int)(row.count)
            return
        counted = Minimum if is_cut else int
        self.counts[TaskState(row.state)] = counted(row.count)
        self.stuck = counted(row.stuck_count) if row.stuck_count else self.stuck


def tally(consumer_ids: Collection[int], using: str) -> dict[int, Tally]:
    """Return a tally for each of ``consumer_ids``, in two statements however many they are."""
    tallies = {consumer_id: Tally() for consumer_id in consumer_ids}
    if not tallies:
        return tallies
    percent = _percent(using)
    params = {"consumer_ids": list(tallies), "limit": COUNTED_MAX, "percent": percent}
    rows = [row for row in sql.rows(using, "tally_tasks", params) if row.count]
    claimable = Counter[int]()
    for row in rows:
        claimable[row.consumer_id] += row.count if row.state in CLAIMABLE else 0
    for row in rows:
        counted = claimable[row.consumer_id] if row.state in CLAIMABLE else row.count
        tallies[row.consumer_id].add(row, is_cut=counted >= COUNTED_MAX, is_sampled=percent < ALL)
    return tallies


def _percent(using: str) -> float:
    """Return how much of the table makes up the sample; all of it while it is small."""
    count = estimate_rows(Task.objects.using(using).all())
    return min(ALL, ALL * SAMPLED / count) if count else ALL
