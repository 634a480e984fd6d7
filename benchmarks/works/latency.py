"""How long after its publication begins a job is handled by a worker that had nothing to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arena import Arena
from benchmarks.peers.board import Stopwatch
from benchmarks.peers.peer import Entry, Peer
from benchmarks.processes import wait_until
from benchmarks.progress import STALL_SECONDS
from benchmarks.works.work import Comparison, Scale

GAP = 0.02  # seconds between two publications: long enough for the worker to be idle again


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from the call that publishes to the start of the handler."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        # Job 0 is queued before: when it is handled, the worker is up.
        watch = Stopwatch.create(arena.board_path, 1 + scale.pings)
        with (
            arena.database(peer, "enqueue", entry.job, 1) as database,
            arena.workers(peer, database, entry.job) as workers,
        ):
            wait_until(lambda: watch.done_count == 1, workers, STALL_SECONDS, "nothing was handled")
            arena.ask(peer, database, "ping", entry.job, scale.pings, GAP)
            wait_until(lambda: watch.done_count == 1 + scale.pings, workers, STALL_SECONDS, "lost")
        return watch.summary()
