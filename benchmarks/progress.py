"""How a drain goes on: the curve of what is done over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.exceptions import RunFailed
from benchmarks.peers.board import Board
from benchmarks.processes import POLL_SECONDS, Worker

STALL_SECONDS = 45


@dataclass(frozen=True, slots=True)
class Point:
    """How many jobs were done at a moment, in seconds of the machine's clock."""

    at: float
    done_count: int


def watch(
    board: Board,
    count: int,
    workers: Sequence[Worker],
    each: Callable[[int], None] = lambda _done_count: None,
) -> list[Point]:
    """Wait until ``count`` jobs are done; return the points from the first one on.

    Calls ``each`` with every new count. Raises RunFailed when a worker ends or stands still.
    """
    curve: list[Point] = []
    moved_at, done_count = time.monotonic(), 0
    while done_count < count:
        for worker in workers:
            worker.check()
        found, now = board.done_count, time.monotonic()
        if found > done_count:
            moved_at, done_count = now, found
            curve.append(Point(now, found))
            each(found)
        elif now - moved_at > STALL_SECONDS:
            said = " | ".join(worker.last_words for worker in workers)
            raise RunFailed(f"stood still at {done_count} of {count} jobs: {said}")
        time.sleep(POLL_SECONDS)
    return curve


def rate_between(curve: Sequence[Point], low: float, high: float) -> float:
    """Return jobs a second between two parts of the work, such as 0.9 and 1."""
    total = curve[-1].done_count
    first = next(point for point in curve if point.done_count >= low * total)
    last = next(point for point in curve if point.done_count >= high * total)
    seconds = last.at - first.at
    return (last.done_count - first.done_count) / seconds if seconds > 0 else 0.0
