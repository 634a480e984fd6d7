"""``python -m benchmarks.plans``: how PostgreSQL runs hot statements, little and much stored."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.arena import Arena
from benchmarks.database import cluster
from benchmarks.peers.kanthorq.peer import PEER

SIZES = (10_000, 5_000_000)


def main() -> None:
    """Print the plans as Markdown."""
    sizes = [int(argument) for argument in sys.argv[1:]] or SIZES
    with tempfile.TemporaryDirectory(prefix="kanthorq-bench-") as folder, cluster() as server:
        arena = Arena(server, Path(folder))
        for size in sizes:
            with arena.database(PEER, "finished", size, 0) as database:
                found = arena.ask(PEER, database, "explain")
            for name, plan in found.items():
                print(f"### {name} with {size:,} events and finished tasks\n\n```\n{plan}\n```\n")


if __name__ == "__main__":
    main()
