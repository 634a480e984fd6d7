"""The memory of a worker, and how soon it is up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arena import Arena
from benchmarks.peers.board import Board
from benchmarks.peers.peer import Entry, Peer
from benchmarks.processes import Worker
from benchmarks.progress import watch
from benchmarks.works.idling import family
from benchmarks.works.work import Comparison, Scale

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory with a long queue, growth from a tenth of it on, seconds to the first handler."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        count = min(scale.queued, round(entry.jobs_per_second * scale.footprint_seconds))
        board = Board.create(arena.board_path, count)
        sizes: dict[int, float] = {}
        with arena.database(peer, "enqueue", entry.job, count) as database:
            began = time.monotonic()
            with arena.workers(peer, database, entry.job) as workers:

                def note(done_count: int) -> None:
                    tenth = 10 * done_count // count
                    if tenth not in sizes:
                        sizes[tenth] = _memory_mib(workers)

                curve = watch(board, count, workers, note)
        arena.check_board(board, count)
        return {
            "memory": max(sizes.values()),
            "growth": sizes[max(sizes)] - sizes.get(1, sizes[min(sizes)]),
            "start": curve[0].at - began,
        }


def _memory_mib(workers: list[Worker]) -> float:
    """Return the resident memory of all processes; pages that they share count once."""
    processes = [process for worker in workers for process in family(worker)]
    return sum(float(process.memory_full_info().pss) for process in processes) / MIB
