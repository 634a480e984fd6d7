"""Commands of manage.py in processes of their own, each with a log file."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from django.conf import settings

STOP_SECONDS = 20.0  # then it is killed


class Process:
    """``manage.py <arguments>`` in the background; used as a context manager it is stopped."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(settings.BASE_DIR / "manage.py"), *arguments],
                cwd=settings.BASE_DIR,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C reaches whole process groups; who started this one tells it when to end.
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Kill it with signal 9: it has no chance to tidy up."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ask it to end, wait until it has, and kill it if it does not."""
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        finally:
            self.kill()
