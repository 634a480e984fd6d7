"""``manage.py demo`` in a process of its own, on the test's database."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from django.conf import settings
from django.db import connection

PATIENCE = 60.0  # seconds


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
    """Start it; it is killed at the end if it still runs."""
    with output.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "manage.py", "demo", *map(str, arguments)],
            cwd=settings.BASE_DIR,
            env=os.environ | environment() | {"TMPDIR": str(output.parent)},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
        )
    try:
        yield Running(process, output)
    finally:
        process.kill()
        process.wait()


def environment() -> dict[str, str]:
    """Return what lets a process work on the test's database."""
    return {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "TESTED_DATABASE": str(connection.settings_dict["NAME"]),
    }


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
