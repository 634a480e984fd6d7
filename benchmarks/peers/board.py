"""What handlers tell the harness: a file that all processes map into their memory.

A mark costs well under a microsecond and survives any death of its process, so it neither slows the
work that is measured nor can be lost. Each job has one byte: how often it was handled.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

PATH_VARIABLE = "BENCH_BOARD"
CLOCK = struct.Struct("q")  # nanoseconds of the machine's monotonic clock; 0 is never


class Board:
    """How often each job of a run was handled."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, job_count: int) -> Board:
        """Return a new board on which no job has been handled."""
        path.write_bytes(bytes(job_count))
        return cls(path)

    def mark(self, number: int) -> None:
        """Count job ``number``, from 0, as handled once more."""
        self._map[number] += 1

    @property
    def done_count(self) -> int:
        """How many jobs were handled at least once."""
        return len(self._map) - self._map[:].count(0)

    @property
    def doubled_count(self) -> int:
        """How many jobs were handled more than once."""
        content = self._map[:]
        return len(content) - content.count(0) - content.count(1)


class Stopwatch:
    """When each job of a run was published, and when its handler began."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, job_count: int) -> Stopwatch:
        """Return a new one on which nothing has happened."""
        path.write_bytes(bytes(2 * CLOCK.size * job_count))
        return cls(path)

    def published(self, number: int) -> None:
        """Note that job ``number``, from 0, is about to be published."""
        self._note(2 * number)

    def handled(self, number: int) -> None:
        """Note that the handler of job ``number`` has begun."""
        self._note(2 * number + 1)

    @property
    def done_count(self) -> int:
        """How many jobs were handled."""
        return sum(handled > 0 for _, handled in self._pairs())

    @property
    def delays_ms(self) -> list[float]:
        """Milliseconds from publishing to handling, of each job for which both are known."""
        pairs = self._pairs()
        return [
            (handled - published) / 1e6 for published, handled in pairs if published and handled
        ]

    def summary(self) -> dict[str, float]:
        """Return the delays' p50, p99 and max, in milliseconds."""
        delays = sorted(self.delays_ms)
        ranks = {"p50": 50, "p99": 99, "max": 100}
        return {
            name: delays[max(0, math.ceil(len(delays) * rank / 100) - 1)]
            for name, rank in ranks.items()
        }

    def is_published(self, number: int) -> bool:
        """Tell whether job ``number`` has been noted as published."""
        return self._read(2 * number) > 0

    def is_handled(self, number: int) -> bool:
        """Tell whether job ``number`` has been noted as handled."""
        return self._read(2 * number + 1) > 0

    def _read(self, slot: int) -> int:
        found: int = CLOCK.unpack_from(self._map, slot * CLOCK.size)[0]
        return found

    def _note(self, slot: int) -> None:
        CLOCK.pack_into(self._map, slot * CLOCK.size, time.monotonic_ns())

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return struct.iter_unpack("qq", self._map[:])


@functools.cache
def board() -> Board:
    """Return the board of the run that this process takes part in."""
    return Board(Path(os.environ[PATH_VARIABLE]))


@functools.cache
def stopwatch() -> Stopwatch:
    """Return the stopwatch of the run that this process takes part in."""
    return Stopwatch(Path(os.environ[PATH_VARIABLE]))
