"""Adapters and workers as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.environments import ROOT
from benchmarks.exceptions import RunFailed

ADAPTER_SECONDS = 600
STOP_SECONDS = 10
POLL_SECONDS = 0.005


def ask(command: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Run a program that answers with a line of JSON. Raises RunFailed if it fails."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=ADAPTER_SECONDS,
    )
    if done.returncode:
        raise RunFailed(f"{' '.join(command[1:4])} failed: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Worker:
    """A worker in the background, with all that it starts; as a context manager it is stopped."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
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
    def last_words(self) -> str:
        return self._log.read_text(errors="replace").strip()[-1500:]

    def check(self) -> None:
        """Raise RunFailed if it has ended."""
        if (status := self._process.poll()) is not None:
            raise RunFailed(f"the worker ended with status {status}: {self.last_words}")

    def stop(self) -> None:
        """Ask it to end, and after a while kill it and its children."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # a session, and so a group, of its own
        self._process.wait()


class Conversation:
    """An adapter that does the same again each time it is asked, and says how long it took."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self._hear()  # that it is ready
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=STOP_SECONDS)
        self._process.kill()
        self._process.wait()

    def ask(self) -> float:
        """Return how many seconds one more turn took. Raises RunFailed if the adapter ended."""
        if self._process.stdin is not None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return float(self._hear())

    def _hear(self) -> str:
        heard = self._process.stdout.readline() if self._process.stdout else ""
        if not heard:
            raise RunFailed(f"the adapter ended with status {self._process.wait()}")
        return heard


def wait_until(
    condition: Callable[[], bool], workers: Sequence[Worker], seconds: float, what: str
) -> None:
    """Return once ``condition`` holds. Raises RunFailed after ``seconds`` or if a worker ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        for worker in workers:
            worker.check()
        if time.monotonic() > deadline:
            said = " | ".join(worker.last_words for worker in workers)
            raise RunFailed(f"{what} after {seconds:.0f} s: {said}")
        time.sleep(POLL_SECONDS)
