"""What the contestant's adapter measures itself: the harness only asks for the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arena import Arena
from benchmarks.peers.board import Stopwatch
from benchmarks.peers.peer import Entry, Peer
from benchmarks.works.work import Comparison, Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Figures of an adapter's own method; the job of an entry holds the method's arguments."""

    comparison: Comparison
    fill: str
    method: str

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        count = round(int(entry.job) * scale.part)
        with arena.database(peer, self.fill, count) as database:
            figures: Mapping[str, float] = arena.ask(peer, database, self.method, count)
        return figures


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Milliseconds from a request to cancel to ``message.cancelled`` in the running handler."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        watch = Stopwatch.create(arena.board_path, scale.pings)
        with (
            arena.database(peer) as database,
            arena.workers(peer, database, entry.job),
        ):
            arena.ask(peer, database, "cancel", entry.job, scale.pings)
        return watch.summary()
