"""Draining a queue that was filled before: jobs that do nothing, and jobs that insert a row."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arena import STALL_SECONDS, Arena
from benchmarks.peers.board import Board
from benchmarks.peers.peer import Entry, Peer
from benchmarks.processes import wait_until
from benchmarks.works.work import Comparison, Scale

COUNT_MAX = 20_000  # of a second's work: whoever is faster has the same number of jobs


@dataclass(frozen=True, slots=True)
class Drain:
    """Jobs a second, from the first handler to the last acknowledgement in the database."""

    comparison: Comparison
    work: str  # under which peers list their entries
    processes: int = 1
    writes_effects: bool = False

    def entries(self, peer: Peer) -> tuple[Entry, ...]:
        return peer.entries_for(self.work)

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        count = round(min(entry.jobs_per_second, COUNT_MAX) * scale.seconds * self.processes)
        board = Board.create(arena.board_path, count)
        with (
            arena.database(peer, entry.job, count) as database,
            arena.workers(peer, database, entry.job, self.processes) as workers,
        ):
            wait_until(lambda: board.done_count > 0, workers, STALL_SECONDS, "nothing was handled")
            began, done_before = time.monotonic(), board.done_count
            wait_until(lambda: board.done_count == count, workers, STALL_SECONDS, "jobs were left")
            arena.wait_until_settled(peer, database, count, workers)
            seconds = time.monotonic() - began
            if self.writes_effects:
                arena.check_effects(database, count)
        arena.check_board(board, count)
        return {"rate": (count - done_before) / seconds}
