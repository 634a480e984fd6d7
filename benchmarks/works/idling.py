"""What a worker costs that has nothing to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # it ships no types
import psycopg

from benchmarks.arena import Arena
from benchmarks.peers.board import Stopwatch
from benchmarks.peers.peer import Entry, Peer
from benchmarks.processes import Worker, wait_until
from benchmarks.progress import STALL_SECONDS
from benchmarks.works.work import Comparison, Scale

SETTLE_SECONDS = 3  # after the first job, for what start-up leaves to do


@dataclass(frozen=True, slots=True)
class Idle:
    """Processor time in percent of one core, and transactions a second, of an idle worker."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        watch = Stopwatch.create(arena.board_path, 1)
        with (
            arena.database(peer, "enqueue", entry.job, 1) as database,
            arena.workers(peer, database, entry.job) as workers,
        ):
            wait_until(lambda: watch.done_count == 1, workers, STALL_SECONDS, "nothing was handled")
            time.sleep(SETTLE_SECONDS)
            before = _cpu_seconds(workers), _transactions(arena, database)
            time.sleep(scale.idle_seconds)
            after = _cpu_seconds(workers), _transactions(arena, database)
        cpu, transactions = (end - begin for begin, end in zip(before, after, strict=True))
        return {
            "cpu": 100 * cpu / scale.idle_seconds,
            "transactions": transactions / scale.idle_seconds,
        }


def _cpu_seconds(workers: list[Worker]) -> float:
    times = [process.cpu_times() for worker in workers for process in family(worker)]
    return float(sum(one.user + one.system for one in times))


def family(worker: Worker) -> list[psutil.Process]:
    """Return a worker's process and all those below it."""
    parent = psutil.Process(worker.pid)
    return [parent, *parent.children(recursive=True)]


def _transactions(arena: Arena, database: str) -> float:
    # From another database: looking must not count.
    query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
    with psycopg.connect(arena.cluster.dsn) as connection:
        row = connection.execute(query, [database]).fetchone()
    return float(row[0]) if row else 0.0
