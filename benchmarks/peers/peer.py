"""What the harness knows about a contestant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

COMMON_WORKS = frozenset({"noop", "insert", "publish", "latency", "idle", "memory"})
BULK_WORKS = COMMON_WORKS | {"many"}  # for those that can publish many at once
FAST_WORKS = BULK_WORKS | {"noop2", "snapshot"}  # for those that drain fast enough to compare
Broker = Literal["postgresql", "redis"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant's part in a work: how the table calls it, and which job it runs."""

    label: str
    job: str
    jobs_per_second: int  # about what is to be expected; only sizes the runs
    environment: Mapping[str, str] = field(default_factory=dict)  # of adapters and workers
    processes: int = 1
    count: int = 0  # of jobs, where the work does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A task system, and how its worker is started."""

    name: str  # in the tables
    package: str  # its folder here
    worker: tuple[str, ...] = ()  # arguments of Python; {job} and {processes} are filled in
    settled: str = ""  # SQL: true once all jobs are acknowledged; empty: nothing to ask
    jobs_per_second: int  # about what it drains of jobs that do nothing
    inserts_per_second: int = 1_000  # about what it drains of jobs that insert a row
    broker: Broker = "postgresql"
    python: tuple[int, int] = (3, 11)  # the oldest it runs on
    settings: str = "benchmarks.peers.settings"  # Django's
    has_processes_option: bool = False  # else several workers are started
    works: frozenset[str] = COMMON_WORKS
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)  # in other works, too

    def entries_for(self, work: str) -> tuple[Entry, ...]:
        """Return how it takes part in a work; empty if it does not."""
        if work in self.entries:
            return self.entries[work]
        if work not in self.works:
            return ()
        if work == "insert":
            return (Entry(self.name, "insert", self.inserts_per_second),)
        job = "ping" if work in {"latency", "idle"} else "noop"
        return (Entry(self.name, job, self.jobs_per_second),)
