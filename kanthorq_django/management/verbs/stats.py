"""``kanthorq stats``: how much there is, waits, runs and got done."""

from argparse import ArgumentParser
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.amounts import counted, listed, plural
from kanthorq_django.domain.redaction import redact
from kanthorq_django.domain.states import TaskState
from kanthorq_django.management.times import format_duration, format_moment
from kanthorq_django.management.verbs.verb import LOCK_TIMEOUT, Verb
from kanthorq_django.models import Worker
from kanthorq_django.models.delivery.cursor import Lag
from kanthorq_django.models.isolation import waiting_at_most
from kanthorq_django.models.maintenance.cancellations import LATELY, Cancellations
from kanthorq_django.models.maintenance.statistics import (
    ConsumerStatistics,
    StreamStatistics,
    consumer_statistics,
    stream_statistics,
)

NONE = "-"
UNREAD = "none"  # a word, as events in a stream that nobody reads are mostly a mistake
NAMED_MAX = 3  # consumers of a worker
STATES = tuple(state.name.lower() for state in TaskState)


class Stats(Verb):
    """Tables, or one JSON object with the same numbers."""

    help = "Show streams, consumers with their tasks and lag, and workers."
    description = (
        "CONSUMERS of a stream are none where nobody reads its events.\n"
        "LAG counts unread events (10,000+ when there are more), UNREAD and DUE say for how long\n"
        "the oldest event and the oldest due task wait, /MIN is completed tasks a minute over\n"
        "the last five. Every task is counted, which takes a while on a large table: to watch\n"
        "a system, ask for its health.\n"
        "\n"
        "Cancellations, if there were any in the last 24 hours: how many tasks ended CANCELLED,\n"
        "in how many a cancellation handler SUCCEEDED or, with its attempts used up, FAILED, the\n"
        "RATE of success, and the MEDIAN and LONGEST time from the request to the end. Below\n"
        "stand the reasons for which handlers failed; what differs by numbers alone is one."
    )
    examples = ("stats", "stats --json | jq '.consumers[] | {name, lag}'")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, *, json: bool, **_: Any) -> None:
        with waiting_at_most(self.database, LOCK_TIMEOUT):
            streams = stream_statistics(self.database)
            consumers = consumer_statistics(self.database)
            workers = _workers(self.database)
        if json:
            self.console.json(
                {
                    "streams": [_stream_json(stream) for stream in streams],
                    "consumers": [_consumer_json(consumer) for consumer in consumers],
                    "workers": workers,
                }
            )
            return
        self._print_streams(streams)
        self._print_consumers(consumers)
        self._print_cancellations([each for each in consumers if each.cancellations])
        self._print_workers(workers)

    def _print_streams(self, streams: list[StreamStatistics]) -> None:
        self.console.table(
            ("STREAM", "EVENTS", "OLDEST", "NEWEST", "CONSUMERS"),
            [
                (
                    stream.name,
                    f"{stream.events:,}",
                    _age(stream.oldest),
                    _age(stream.newest),
                    f"{stream.consumers:,}" if stream.consumers else UNREAD,
                )
                for stream in streams
            ],
            numbers={"EVENTS", "OLDEST", "NEWEST", "CONSUMERS"},
        )

    def _print_consumers(self, consumers: list[ConsumerStatistics]) -> None:
        numbers = ("LAG", "UNREAD", *map(str.upper, STATES), "STUCK", "DUE", "/MIN")
        self.console.line("")
        self.console.table(
            ("CONSUMER", "STREAM", *numbers),
            [
                (
                    consumer.name,
                    consumer.stream,
                    _lag(consumer.lag),
                    _age(consumer.lag.oldest),
                    *(f"{count:,}" for count in consumer.tasks.values()),
                    f"{consumer.stuck:,}",
                    _age(consumer.oldest_due),
                    f"{consumer.per_minute:,.1f}",
                )
                for consumer in consumers
            ],
            numbers=numbers,
        )

    def _print_cancellations(self, consumers: list[ConsumerStatistics]) -> None:
        if not consumers:
            return
        numbers = ("CANCELLED", "SUCCEEDED", "FAILED", "RATE", "MEDIAN", "LONGEST")
        self.console.line("")
        self.console.table(
            ("CANCELLATIONS OF", *numbers),
            [(each.name, *_cancellation_row(each.cancellations)) for each in consumers],
            numbers=numbers,
        )
        for each in consumers:
            for error, count in _failures(each.cancellations):
                self.console.line(f"  {each.name}: {count:,} x {error}")

    def _print_workers(self, workers: list[dict[str, Any]]) -> None:
        alive = [worker for worker in workers if worker["alive"]]
        gone = len(workers) - len(alive)
        self.console.line("")
        self.console.table(
            ("WORKER", "ALIVE", "CONCURRENCY", "STARTED", "SEEN", "CONSUMERS"),
            [
                (
                    f"{worker['pid']}@{worker['host']}",
                    "yes",
                    str(worker["concurrency"]),
                    format_moment(worker["started_at"]),
                    format_moment(worker["seen_at"]),
                    listed(worker["consumers"], shown_max=NAMED_MAX),
                )
                for worker in alive
            ],
            numbers={"CONCURRENCY"},
        )
        if gone:
            last = max(worker["seen_at"] for worker in workers if not worker["alive"])
            told = f"{counted(gone, 'worker')} {plural(gone, 'is', 'are')} gone"
            self.console.line(f"{told}, last seen {format_moment(last)}")


def _age(age: timedelta | None) -> str:
    return NONE if age is None else format_duration(age)


def _lag(lag: Lag) -> str:
    return f"{lag.count:,}{'+' if lag.is_bounded else ''}"


def _seconds(age: timedelta | None) -> float | None:
    return None if age is None else age.total_seconds()


def _span(span: timedelta | None) -> str:
    """Return ``span`` with tenths while it is short: good cancellations take less than seconds."""
    if span is None or span >= timedelta(minutes=1):
        return _age(span)
    return f"{span.total_seconds():.1f}s"


def _cancellation_row(told: Cancellations) -> tuple[str, ...]:
    return (
        f"{told.cancelled:,}{'+' if told.is_bounded else ''}",
        f"{told.succeeded:,}",
        f"{told.failed:,}",
        NONE if told.success_rate is None else f"{told.success_rate:.0%}",
        _span(told.median),
        _span(told.longest),
    )


def _cancellation_json(told: Cancellations) -> dict[str, Any]:
    return {
        "window_seconds": LATELY.total_seconds(),
        "cancelled": told.cancelled,
        "is_bounded": told.is_bounded,
        "handler_succeeded": told.succeeded,
        "handler_failed": told.failed,
        "success_rate": told.success_rate,
        "median_seconds": _seconds(told.median),
        "longest_seconds": _seconds(told.longest),
        "failures": [{"error": error, "count": count} for error, count in _failures(told)],
    }


def _failures(told: Cancellations) -> Iterator[tuple[str, int]]:
    """Yield the reasons without the values that the settings keep from terminals."""
    for error, count in told.failures:
        yield redact(error, get_settings().REDACTED_KEYS, is_error=True), count


def _stream_json(stream: StreamStatistics) -> dict[str, Any]:
    return {
        "name": stream.name,
        "events": stream.events,
        "consumers": stream.consumers,
        "oldest_seconds": _seconds(stream.oldest),
        "newest_seconds": _seconds(stream.newest),
    }


def _consumer_json(consumer: ConsumerStatistics) -> dict[str, Any]:
    return {
        "name": consumer.name,
        "stream": consumer.stream,
        "lag": consumer.lag.count,
        "lag_is_bounded": consumer.lag.is_bounded,
        "oldest_unread_seconds": _seconds(consumer.lag.oldest),
        "tasks": dict(zip(STATES, consumer.tasks.values(), strict=True)),
        "stuck": consumer.stuck,
        "oldest_due_seconds": _seconds(consumer.oldest_due),
        "completed_per_minute": consumer.per_minute,
        "cancellations": _cancellation_json(consumer.cancellations),
    }


def _workers(using: str) -> list[dict[str, Any]]:
    workers = Worker.objects.using(using).order_by("host", "pid", "pk")
    alive = [_worker(worker, is_alive=True) for worker in workers.alive()]
    return alive + [_worker(worker, is_alive=False) for worker in workers.dead()]


def _worker(worker: Worker, *, is_alive: bool) -> dict[str, Any]:
    return {
        "id": worker.pk,
        "host": worker.host,
        "pid": worker.pid,
        "alive": is_alive,
        "concurrency": worker.concurrency,
        "consumers": worker.consumers,
        "started_at": worker.started_at,
        "seen_at": worker.seen_at,
    }
