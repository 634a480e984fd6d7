"""``manage.py demo`` in a process of its own, on the test's database."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from django.conf import settings
from django.db import connection

PATIENCE = 60.0  # seconds
TAIL = 2_000  # characters of a log that a failure shows
MARK = "DEMO_OF_A_TEST"


class Running(NamedTuple):
    """A demo that runs, and the file it writes to."""

    process: subprocess.Popen[bytes]
    output: Path

    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        return self.process.wait(PATIENCE)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until it has written something that matches."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.text())) is None:
            assert time.monotonic() < deadline, f"{pattern!r} never appeared in: {self.text()}"
            assert self.process.poll() is None, f"It ended without {pattern!r}: {self.text()}"
            time.sleep(0.05)
        return found


@contextmanager
def demo(output: Path, *arguments: object) -> Iterator[Running]:
    """Start it; it is killed at the end if it still runs.

    If the block raises, so is whatever it has started: servers and workers that nobody tells to
    end would go on, and take the tasks of the next tests.
    """
    with output.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "manage.py", "demo", *map(str, arguments)],
            cwd=settings.BASE_DIR,
            env=os.environ | environment() | {"TMPDIR": str(output.parent), MARK: str(output)},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
        )
    try:
        yield Running(process, output)
    except BaseException as error:
        kill_all(output)
        error.add_note(said(output))
        raise
    finally:
        process.kill()
        process.wait()


def said(output: Path) -> str:
    """Return what the demo and those that it has started have written last."""
    logs = [output, *sorted(output.parent.glob("kanthorq-demo-*/*.log"))]
    return "\n".join(f"{log.name}:\n{log.read_text()[-TAIL:]}" for log in logs)


def kill_all(output: Path) -> None:
    """Kill the demo that writes to ``output``, all that it has started, and what that has."""
    deadline = time.monotonic() + PATIENCE
    while pids := descendants(output):
        assert time.monotonic() < deadline, f"{pids} cannot be killed"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(output: Path) -> list[int]:
    """Return the processes of a demo, orphans too: they all have inherited its environment."""
    mark = f"{MARK}={output}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has just gone, or is another account's
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def environment() -> dict[str, str]:
    """Return what lets a process work on the test's database."""
    return {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "TESTED_DATABASE": str(connection.settings_dict["NAME"]),
    }
