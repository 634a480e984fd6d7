"""Runs works: contestants take turns, A B C A B C, so that all share whatever disturbs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from benchmarks.arena import Arena
from benchmarks.environments import python_of
from benchmarks.exceptions import BenchmarkError, PeerUnavailable
from benchmarks.measurement import Series
from benchmarks.peers.peer import Entry, Peer
from benchmarks.works.work import Comparison, JointWork, Scale, Work


@dataclass(frozen=True, slots=True)
class Result:
    """What a work came to: for each contestant and metric a value per round."""

    comparison: Comparison
    series: list[Series]


def available(peers: Sequence[Peer], arena: Arena) -> Iterator[Peer]:
    """Yield the contestants that can take part here, and say of the others why not."""
    for peer in peers:
        if peer.broker == "redis" and arena.redis is None:
            print(f"{peer.name} is skipped: there is no redis-server", file=sys.stderr)
            continue
        try:
            python_of(peer)
        except PeerUnavailable as error:
            print(f"{peer.name} is skipped: {error}", file=sys.stderr)
        else:
            yield peer


def run(
    work: Work | JointWork, peers: Sequence[Peer], arena: Arena, rounds: int, scale: Scale
) -> Result | None:
    """Run a work ``rounds`` times; return None if nobody takes part in it."""
    name = work.comparison.name
    parts = [(peer, entry) for peer in peers for entry in peer.entries_for(name)]
    groups = [parts] if isinstance(work, JointWork) else [[part] for part in parts]
    metrics = work.comparison.metrics
    columns = {
        entry.label: [Series(entry.label, metric.name) for metric in metrics] for _, entry in parts
    }
    for number in range(rounds):
        where = f"{name} {number + 1}/{rounds}"
        for group in groups:
            labels = [entry.label for _, entry in group]
            print(f"{where}: {', '.join(labels)}", file=sys.stderr)
            _measure(work, group, arena, scale, [columns[label] for label in labels])
    series = [one for found in columns.values() for one in found]
    return Result(work.comparison, series) if series else None


def _measure(
    work: Work | JointWork,
    group: Sequence[tuple[Peer, Entry]],
    arena: Arena,
    scale: Scale,
    columns: Sequence[Sequence[Series]],
) -> None:
    if any(series.failure for series in chain(*columns)):
        return  # what failed once is not tried again: it may take minutes to stand still
    try:
        figures = _figures(work, group, arena, scale)
    except BenchmarkError as error:
        print(f"  failed: {error}", file=sys.stderr)
        for series in chain(*columns):
            series.failure = str(error)
            series.values.append(None)
        return
    for series in chain(*columns):
        series.values.append(figures[series.label][series.metric])


def _figures(
    work: Work | JointWork, group: Sequence[tuple[Peer, Entry]], arena: Arena, scale: Scale
) -> Mapping[str, Mapping[str, float]]:
    if isinstance(work, JointWork):
        return work.measure_together(arena, group, scale)
    ((peer, entry),) = group
    return {entry.label: work.measure(arena, peer, entry, scale)}
