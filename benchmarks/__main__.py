"""``python -m benchmarks``: choose works and contestants, run them in turns, report."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import brokers, chart, contest, document, report
from benchmarks.arena import Arena
from benchmarks.database import Cluster, cluster
from benchmarks.peers import catalogue as peers
from benchmarks.works import work
from benchmarks.works.catalogue import DEFAULT, WORKS

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run what the command line asks for."""
    given = _arguments()
    # So that servers and workers are stopped then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    began = time.monotonic()
    chosen = [one for one in WORKS if one.comparison.name in given.works]
    scale = work.QUICK if given.quick else work.LONG if given.all else work.NORMAL
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="kanthorq-bench-") as folder,
        cluster() as server,
        brokers.redis(Path(folder)) as redis,
    ):
        arena = Arena(server, Path(folder), redis)
        contestants = list(contest.available(peers.load(given.peers), arena))
        about = _about(server)
        for one in chosen:
            if result := contest.run(one, contestants, arena, given.rounds, scale):
                results.append(result)
                print("\n" + report.table(result), flush=True)
    _write(given, results, about)
    print(f"{time.monotonic() - began:.0f} s; written to {given.output}", file=sys.stderr)


def _write(
    given: argparse.Namespace, results: Sequence[contest.Result], about: dict[str, Any]
) -> None:
    given.output.mkdir(parents=True, exist_ok=True)
    report.write_json(results, about, given.output / "results.json")
    report.write_tables(results, about, given.output / "results.md")
    chart.write(results, given.output / "results.svg")
    if given.document:
        document.update(given.document, results, about)


def _arguments() -> argparse.Namespace:
    names = [one.comparison.name for one in WORKS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="about a minute: beside pgqueuer")
    parser.add_argument("--all", action="store_true", help="an hour: also what grows and how")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--peers", type=_names, help="only these, by comma")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--document", type=Path, help="a Markdown file to put the tables into")
    given = parser.parse_args()
    if unknown := set(given.works) - set(names):
        parser.error(f"no work is called {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    chosen = WORKS if given.all else DEFAULT
    given.works = given.works or [
        one.comparison.name
        for one in chosen
        if given.all or not given.quick or one.comparison.name != "noop2"
    ]
    given.peers = given.peers or _peers(given)
    return given


def _peers(given: argparse.Namespace) -> tuple[str, ...]:
    if given.quick:
        return peers.QUICK
    return peers.ALL if given.all else peers.ON_POSTGRESQL


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _about(server: Cluster) -> dict[str, Any]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "postgresql": server.settings(),
    }


if __name__ == "__main__":
    main()
