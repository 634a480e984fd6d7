"""What every kind of work has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from benchmarks.arena import Arena
from benchmarks.peers.peer import Entry, Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How long a run takes; medians want few long rounds, a first look many short ones."""

    seconds: float  # that a run is about to last
    pings: int  # messages of one measurement of latency
    bulk: int = 10_000  # events that are published at once
    idle_seconds: float = 10
    queued: int = 1_000_000  # for the memory of a worker
    footprint_seconds: float  # that the slower ones may take to drain what is queued
    part: float = 1.0  # of large tables


QUICK = Scale(seconds=0.8, pings=60, idle_seconds=3, queued=20_000, footprint_seconds=2, part=0.02)
NORMAL = Scale(seconds=1.5, pings=100, footprint_seconds=20)
LONG = Scale(seconds=2.5, pings=300, footprint_seconds=20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure that a run yields."""

    name: str
    unit: str
    is_better_when_higher: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is to be reached: at least if higher is better, else at most."""

    label: str
    metric: str
    ratio: float = math.nan  # to the reference
    value: float = math.nan  # or in the metric's own unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a table shows: its title, its columns, and to whom all are compared."""

    name: str
    title: str
    metrics: tuple[Metric, ...]
    reference: str = ""  # a label; empty: the fastest that is not KanthorQ
    goals: tuple[Goal, ...] = ()
    is_sequence: bool = False  # shown in the given order, not the best first


@runtime_checkable
class JointWork(Protocol):
    """Something that contestants do in so short turns that all have to be up at once."""

    @property
    def comparison(self) -> Comparison: ...

    def measure_together(
        self, arena: Arena, parts: Sequence[tuple[Peer, Entry]], scale: Scale
    ) -> Mapping[str, Mapping[str, float]]:
        """Run it once; return each contestant's figures by its label. Raises RunFailed."""
        ...


class Work(Protocol):
    """Something that contestants do in turn."""

    @property
    def comparison(self) -> Comparison: ...

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        """Run it once; return the figures by the names of the metrics. Raises RunFailed."""
        ...
