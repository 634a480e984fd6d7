"""Running ``manage.py kanthorq`` here, as a process of its own, and on a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from io import StringIO
from typing import Any, NamedTuple

from django.conf import settings
from django.core.management import call_command
from django.db import connection

DEADLINE = 60.0  # seconds for a process to answer or end


class Terminal(StringIO):
    """Somebody who watches, or has typed what it holds."""

    def isatty(self) -> bool:
        return True


class Ran(NamedTuple):
    """What a command printed, and its exit status."""

    out: str
    err: str
    status: int = 0

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def words(self) -> list[list[str]]:
        return [line.split() for line in self.lines]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def kanthorq(*args: object) -> Ran:
    """Run the command here. Raises CommandError, as a caller in code would get it."""
    out, err = StringIO(), StringIO()
    try:
        call_command("kanthorq", *args, stdout=out, stderr=err)
    except SystemExit as leaving:
        return Ran(out.getvalue(), err.getvalue(), int(leaving.code or 0))
    return Ran(out.getvalue(), err.getvalue())


def manage(*args: object, stdin: bytes = b"", **variables: str) -> Ran:
    """Run ``manage.py kanthorq`` as a process without a terminal, on the test's database."""
    ran = subprocess.run(
        command(*args),
        env=environment() | variables,
        cwd=settings.BASE_DIR,
        input=stdin,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    return Ran(ran.stdout.decode(), ran.stderr.decode(), ran.returncode)


def on_terminal(*args: object, question: str, answer: str) -> Ran:
    """Run it on a terminal and type ``answer`` when ``question`` has appeared on it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*args),
        env=environment(),
        cwd=settings.BASE_DIR,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        seen = _read(ours, until=question)
        os.write(ours, f"{answer}\n".encode())
        seen += _read(ours)
        return Ran(seen, "", process.wait(DEADLINE))
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def command(*args: object) -> list[str]:
    """Return the command line, without system checks: leases in tests are too short for them."""
    return [sys.executable, "manage.py", "kanthorq", "--skip-checks", *map(str, args)]


def environment() -> dict[str, str]:
    """Return the environment in which a process works on the test's database."""
    return os.environ | {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "TESTED_DATABASE": str(connection.settings_dict["NAME"]),
    }


def _read(terminal: int, until: str | None = None) -> str:
    """Return what appears on the terminal, up to ``until`` or the end of the process."""
    seen, deadline = "", time.monotonic() + DEADLINE
    while until is None or until not in seen:
        assert time.monotonic() < deadline, f"{until!r} never appeared in {seen!r}"
        ready, _, _ = select.select([terminal], [], [], 1)
        if not ready:
            continue
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not chunk:
            break
        seen += chunk.decode()
    return seen
