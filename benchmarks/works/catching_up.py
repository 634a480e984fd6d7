"""A consumer that selects few of many events reads through all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arena import Arena
from benchmarks.peers.board import Board
from benchmarks.peers.peer import Entry, Peer
from benchmarks.progress import watch
from benchmarks.works.work import Comparison, Scale

RARE_EVERY = 10_000


@dataclass(frozen=True, slots=True)
class CatchingUp:
    """Events read a second, from the first that is selected to the last."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        events = max(10 * RARE_EVERY, round(int(entry.job) * scale.part))
        count = events // RARE_EVERY
        board = Board.create(arena.board_path, count)
        with (
            arena.database(peer, "events", events) as database,
            arena.workers(peer, database, "rare") as workers,
        ):
            curve = watch(board, count, workers)
        arena.check_board(board, count)
        first, last = curve[0], curve[-1]
        read = RARE_EVERY * (last.done_count - first.done_count)
        return {"rate": read / (last.at - first.at)}
