"""How much there is: streams with their events, consumers with their tasks and their lag."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from kanthorq_django import sql
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.consumer import Consumer
from kanthorq_django.models.delivery.cursor import Lag
from kanthorq_django.models.maintenance.cancellations import Cancellations, cancellations

LATELY = timedelta(minutes=5)  # over which the throughput is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatistics:
    """``oldest`` and ``newest`` are the ages of its first and last event; None without any."""

    name: str
    events: int
    consumers: int
    oldest: timedelta | None
    newest: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStatistics:
    """``tasks`` counts by state; ``stuck`` ones, whose lease ran out, are running ones too.

    ``oldest_due`` is for how long the longest-waiting due task has been due.
    ``completed_lately`` counts what was completed within ``LATELY``.
    """

    name: str
    stream: str
    tasks: Mapping[TaskState, int]
    stuck: int
    oldest_due: timedelta | None
    completed_lately: int
    lag: Lag
    cancellations: Cancellations

    @property
    def per_minute(self) -> float:
        """Tasks completed a minute, over the last five."""
        return self.completed_lately / (LATELY / timedelta(minutes=1))


def stream_statistics(using: str) -> list[StreamStatistics]:
    """Return every stream's numbers, by name."""
    return [
        StreamStatistics(
            name=row.name,
            events=row.event_count,
            consumers=row.consumer_count,
            oldest=row.oldest,
            newest=row.newest,
        )
        for row in sql.rows(using, "stats_streams", {})
    ]


def consumer_statistics(using: str) -> list[ConsumerStatistics]:
    """Return every consumer's numbers, by stream and name. Counts every task: not for polling."""
    consumers = Consumer.objects.using(using).in_bulk()
    cancelled = cancellations(consumers, using)
    return [
        ConsumerStatistics(
            name=row.name,
            stream=row.stream,
            tasks={state: getattr(row, state.name.lower()) for state in TaskState},
            stuck=row.stuck,
            oldest_due=row.oldest_due,
            completed_lately=row.completed_lately,
            lag=consumers[row.id].lag(),
            cancellations=cancelled[row.id],
        )
        for row in sql.rows(using, "stats_consumers", {"lately": LATELY})
        if row.id in consumers
    ]
