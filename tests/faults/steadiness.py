"""Whether a process that runs on and on takes no more memory, files and threads than before."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

WARM_SECONDS = 60.0  # at least, until everything has run once
GROWTH_BYTES_MAX = 4 * 2**20  # between the means of two halves: what allocators do by chance
FILES_MAX, THREADS_MAX = 8, 8  # more than in the first half: connections that are just replaced


class Look(NamedTuple):
    """What a process held at a moment."""

    at: float  # seconds
    bytes: int  # resident
    files: int
    threads: int


@dataclass
class Steadiness:
    """The looks at one process."""

    looks: list[Look] = field(default_factory=list)

    def look(self, pid: int, at: float) -> None:
        """Note what the process holds; nothing if it has ended."""
        process = Path(f"/proc/{pid}")
        try:
            pages = int((process / "statm").read_text().split()[1])
            files, threads = (len(list((process / what).iterdir())) for what in ("fd", "task"))
        except OSError:
            return
        self.looks.append(Look(at, pages * os.sysconf("SC_PAGE_SIZE"), files, threads))

    @property
    def growth_bytes(self) -> int:
        """Return by how much the second half takes more than the first one, once warm."""
        first, second = self._halves()
        return round(median(_bytes(second)) - median(_bytes(first))) if second else 0

    @property
    def told(self) -> str:
        """Return the last look in words."""
        if not self.looks:
            return "nothing seen yet"
        last = self.looks[-1]
        return f"{last.bytes / 2**20:.1f} MiB, {last.files} files, {last.threads} threads"

    def wrong(self) -> list[str]:
        """Return what has not been steady."""
        first, second = self._halves()
        if not second:
            return ["memory: too few looks to tell"]
        found = []
        if (grown := self.growth_bytes) > GROWTH_BYTES_MAX:
            found.append(f"memory: grew by {grown} bytes, to {self.told}")
        for what, most in (("files", FILES_MAX), ("threads", THREADS_MAX)):
            before = median(getattr(look, what) for look in first)
            after = median(getattr(look, what) for look in second[-max(3, len(second) // 4) :])
            if after > before + most:
                found.append(f"left behind: {before:g} {what} have become {after:g}")
        return found

    def _halves(self) -> tuple[list[Look], list[Look]]:
        """Return the looks once warm: a quarter of the time, and a minute where there is one."""
        if not self.looks:
            return [], []
        end = self.looks[-1].at
        warm = max(end / 4, min(WARM_SECONDS, end / 2))
        middle = (warm + end) / 2
        first = [look for look in self.looks if warm <= look.at < middle]
        second = [look for look in self.looks if look.at >= middle]
        return (first, second) if first else ([], [])


def _bytes(looks: list[Look]) -> list[int]:
    return [look.bytes for look in looks]
