"""What clients saw, written down as it happens: one JSON line before and after each call.

Each process has a file of its own, and a line is one write(). Of the last one a killed process may
leave a part: it ends where a page of memory does. What was not all written did not happen.
"""

import itertools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.faults.facts import Handling, Operation, Publication

Line = Mapping[str, Any]


class History:
    """Appends lines to a file in ``folder``; shared by the threads of one process."""

    def __init__(self, folder: Path) -> None:
        self.who = f"{os.getpid()}-{time.time_ns()}"
        path = folder / f"{self.who}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._calls = itertools.count()
        self._lock = threading.Lock()

    def begin(self, what: str, **facts: object) -> str:
        """Note that a call begins; return its name for what follows."""
        with self._lock:
            call = f"{self.who}-{next(self._calls)}"
        self._write(call, what=what, **facts)
        return call

    def note(self, call: str, **facts: object) -> None:
        """Add what has become known about a call."""
        self._write(call, **facts)

    def _write(self, call: str, **facts: object) -> None:
        line = {"call": call, "at": time.time(), **facts}
        os.write(self._file, json.dumps(line, default=str).encode() + b"\n")


def read(folder: Path) -> list[list[Line]]:
    """Return the lines of each call in order, calls by their beginnings."""
    calls: dict[str, list[Line]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        *lines, _cut_off = path.read_text().split("\n")
        for line in lines:
            known = json.loads(line)
            calls[known["call"]].append(known)
    return sorted(calls.values(), key=lambda lines: float(lines[0]["at"]))


def publications(calls: list[list[Line]]) -> Iterator[Publication]:
    for lines in calls:
        if lines[0]["what"] == "publish":
            known = _merged(lines)
            events = frozenset(known.get("events", ()))
            yield Publication(events=events, outcome=known.get("outcome"))


def handlings(calls: list[list[Line]]) -> Iterator[Handling]:
    for lines in calls:
        if lines[0]["what"] in ("handle", "cancel"):
            first = lines[0]
            yield Handling(
                consumer=first["consumer"],
                event=first["event"],
                task=first["task"],
                epoch=first["epoch"],
                verb=first["what"],
                who=first["call"].rsplit("-", 1)[0],
                outcomes=frozenset(line["outcome"] for line in lines[1:]),
            )


def operations(calls: list[list[Line]]) -> Iterator[Operation]:
    for lines in calls:
        if lines[0]["what"] == "operate":
            known = _merged(lines)
            yield Operation(
                verb=known["verb"],
                consumer=known["consumer"],
                updated=frozenset(known.get("updated", ())),
                outcome=known.get("outcome"),
            )


def _merged(lines: list[Line]) -> Line:
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= line
    return merged
