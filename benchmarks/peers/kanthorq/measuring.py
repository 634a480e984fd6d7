"""What is measured by taking a worker's steps one by one."""

import statistics
import time
from collections.abc import Callable, Iterable

from benchmarks.peers.adapter import body
from benchmarks.peers.board import stopwatch
from kanthorq_django import publish, publish_many
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.registration import Registration

PULLS = 50
PULL_SIZE = 100
RUNNING_SECONDS = 0.05  # that a handler runs before it is asked to stop
PATIENCE = 30.0
LOOK_SECONDS = 0.0005


def pull_milliseconds(stream: str) -> float:
    """Return the median time of a pull of 100 new events, at the end of a stream."""
    consumer = Consumer.objects.register("late", Registration(stream, [">"], deliver="new"))
    took = []
    for _ in range(PULLS):
        publish_many([Event(subject="new") for _ in range(PULL_SIZE)], stream=stream)
        began = time.perf_counter()
        leased = consumer.pull(PULL_SIZE)
        took.append(time.perf_counter() - began)
        assert len(leased) == PULL_SIZE
    return 1_000 * statistics.median(took)


def cancel_running(job: str, numbers: Iterable[int]) -> None:
    """Publish a job, let its handler run, request its end; again for each number."""
    watch = stopwatch()
    for number in numbers:
        event = publish(job, body(number), stream=job)
        _wait(lambda number=number: watch.is_published(number))  # type: ignore[misc]  # mypy #15459
        time.sleep(RUNNING_SECONDS)
        watch.published(number)
        Task.objects.filter(event=event).cancel(running=True)
        _wait(lambda number=number: watch.is_handled(number))  # type: ignore[misc]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(LOOK_SECONDS)
