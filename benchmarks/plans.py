"""``python -m benchmarks.plans``: how PostgreSQL runs hot statements, little and much stored."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.arena import Arena
from benchmarks.database import cluster
from benchmarks.peers.kanthorq.peer import PEER

SIZES = (10_000, 5_000_000)

PROMISED = {
    "publish": "One event: the stream by its name, then the insert.",
    "peek": "A worker's look for work when there is none: it probes the ends of indexes.",
    "pull": "100 new events become tasks: one range of `kanthorq_event_unread`, begun at the "
    "folded comparison of `xid` and `id`, and no sort of events.",
    "claim": "100 due tasks: the head of `kanthorq_task_due`, which holds unfinished tasks alone, "
    "then primary keys.",
    "renew": "100 leases: primary keys alone.",
    "ack": "99 tasks end well: primary keys alone. `state + 0` keeps the planner away from indexes "
    "of unfinished tasks with their dead entries.",
    "ack_last": "One task ends together with its handler's transaction: its primary key.",
}
INTRODUCTION = """\
# Plans

How PostgreSQL runs the statements that workers and publishers repeat, printed by
`python -m benchmarks.plans` with {sizes} events stored, and as many finished tasks: by the plans
that the server keeps for them, where it keeps any. There must be no sequential scan of events or
tasks, and no sort of more rows than are leased. What each plan is for tells
[performance](performance.md#plans-that-must-not-change).
"""


def main() -> None:
    """Print the plans as Markdown."""
    sizes = [int(argument) for argument in sys.argv[1:]] or SIZES
    with tempfile.TemporaryDirectory(prefix="kanthorq-bench-") as folder, cluster() as server:
        arena = Arena(server, Path(folder))
        found = {size: _plans(arena, size) for size in sizes}
    print(INTRODUCTION.format(sizes=" and with ".join(f"{size:,}" for size in sizes)))
    for name, promise in PROMISED.items():
        print(f"## {name}\n\n{promise}\n")
        for size in sizes:
            print(f"{size:,} stored:\n\n```\n{found[size][name]}\n```\n")


def _plans(arena: Arena, size: int) -> dict[str, str]:
    with arena.database(PEER, "finished", size, 0) as database:
        plans: dict[str, str] = arena.ask(PEER, database, "explain")
    return plans


if __name__ == "__main__":
    main()
