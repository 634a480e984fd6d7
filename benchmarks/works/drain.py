"""Draining a queue that was filled before: jobs that do nothing, and jobs that insert a row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import psycopg

from benchmarks.arena import Arena
from benchmarks.peers.board import Board
from benchmarks.peers.peer import Entry, Peer
from benchmarks.progress import rate_between, watch
from benchmarks.works.work import Comparison, Scale

COUNT_MAX = 20_000  # of a second's work: whoever is faster has the same number of jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Jobs a second, from the first handler to the last acknowledgement in the database.

    ``time`` is how long that takes, ``each`` the part of one job, ``flatness`` the rate of the
    last tenth over that of the first.
    """

    comparison: Comparison
    processes: int = 1
    writes_effects: bool = False
    holds_snapshot: bool = False  # another session's, open all the time
    seconds_times: float = 1  # longer than other runs

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        processes = max(self.processes, entry.processes)
        seconds = scale.seconds * self.seconds_times * min(processes, 2)
        count = round(min(entry.jobs_per_second, COUNT_MAX) * seconds)
        if entry.count:
            count = max(min(1_000, entry.count), round(entry.count * scale.part))
        fill = self.fill(entry, count, scale)
        board = Board.create(arena.board_path, count)
        environment = entry.environment
        with (
            arena.database(peer, *fill, environment=environment) as database,
            held_snapshot(arena, database) if self.holds_snapshot else nullcontext(),
            arena.workers(
                peer, database, self.job(entry), processes, environment=environment
            ) as workers,
        ):
            curve = watch(board, count, workers)
            arena.wait_until_settled(peer, database, count, workers)
            ended_at = time.monotonic()
            if self.writes_effects:
                arena.check_effects(database, count)
        arena.check_board(board, count)
        first = curve[0]
        seconds = ended_at - first.at
        return {
            "rate": (count - first.done_count) / seconds,
            "time": seconds * 1_000,
            "each": seconds * 1_000_000 / count,
            "flatness": rate_between(curve, 0.9, 1) / (rate_between(curve, 0, 0.1) or 1),
        }

    def job(self, entry: Entry) -> str:
        """Return what the worker is to run; empty: all there is."""
        return "noop" if self.comparison.name == "past" else entry.job

    def fill(self, entry: Entry, count: int, scale: Scale) -> tuple[object, ...]:
        """Return what the adapter is asked to prepare."""
        if self.comparison.name == "past":
            return "finished", round(int(entry.job) * scale.part), count
        return "enqueue", entry.job or "noop", count


@contextmanager
def held_snapshot(arena: Arena, database: str) -> Iterator[None]:
    """Let a session see the database as it is now, as a report or a backup does."""
    with psycopg.connect(arena.cluster.url(database)) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield
        connection.rollback()
