"""``manage.py runworker`` in processes of its own, on the test's database."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import psutil  # type: ignore[import-untyped]  # it ships no types
from django.conf import settings
from django.db import connection

from kanthorq_django.models import Worker
from tests.concurrency import wait_until

PATIENCE = 30.0  # seconds in which whatever is waited for has to happen


class RunningWorker:
    """A process that runs workers, and what it says."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: BinaryIO) -> None:
        self.process = process
        self._output = output
        self._said = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """What it has printed and logged so far."""
        if self._output.closed:
            return self._said
        size_bytes = os.fstat(self._output.fileno()).st_size
        # Not read(): the process writes at the same offset.
        return os.pread(self._output.fileno(), size_bytes, 0).decode(errors="replace")

    def remember(self) -> None:
        """Keep what it has said, as its file is about to go."""
        self._said = self.text

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; return its exit status, minus the signal's number if one ended it."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"It did not end:\n{self.text}") from None

    def wait_until_started(self, count: int = 1) -> list[int]:
        """Wait until ``count`` workers of it have signed in; return their process ids."""
        wait_until(lambda: len(self.workers()) == count or not self.is_running, PATIENCE)
        assert self.is_running, self.text
        return self.workers()

    def workers(self) -> list[int]:
        """Return the process ids of its workers that have signed in, and still are alive."""
        signed_in = Worker.objects.values_list("pid", flat=True)
        return [pid for pid in signed_in if is_alive(pid) and os.getpgid(pid) == self.pid]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until it has printed something that matches."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.text)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} never appeared in:\n{self.text}"
            assert self.is_running, f"It ended without {pattern!r}:\n{self.text}"
            time.sleep(0.02)
        return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def abort(self) -> None:
        """End it and its children; each says first what its threads were at."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)

    def terminate(self) -> int:
        """Send SIGTERM; return the exit status."""
        self.send(signal.SIGTERM)
        return self.wait()


@contextmanager
def runworker(*arguments: object, **variables: str) -> Iterator[RunningWorker]:
    """Start it; whatever is left of it at the end is killed, its children as well."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "manage.py", "runworker", "--skip-checks", *map(str, arguments)],
            cwd=settings.BASE_DIR,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        worker = RunningWorker(process, output)
        try:
            yield worker
        except AssertionError as error:
            worker.abort()
            error.add_note(f"What the worker said:\n{worker.text}")
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            worker.remember()


def environment() -> dict[str, str]:
    """Return the environment in which a process works on the test's database."""
    return os.environ | {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONFAULTHANDLER": "1",
        "TESTED_DATABASE": str(connection.settings_dict["NAME"]),
        "DEBUG": "false",
        "SECRET_KEY": "of a test",
    }


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and is not just waiting to be waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
