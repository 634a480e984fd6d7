"""The shop's workers, as processes that can be killed."""

import socket
from contextlib import ExitStack
from pathlib import Path

from kanthorq_django.models import Worker
from project.shop.processes import Process

CONCURRENCY = 8


class WorkerEnded(Exception):
    """A worker ended that nobody had told to."""


class Crew:
    """Processes of ``manage.py runworker``; as a context manager they are stopped at the end."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._size = size
        self._processes: list[Process] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Crew":
        with ExitStack() as stack:
            for number in range(1, self._size + 1):
                log = self._folder / f"worker-{number}.log"
                worker = Process("runworker", "--concurrency", str(CONCURRENCY), log=log)
                self._processes.append(stack.enter_context(worker))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def is_ready(self) -> bool:
        """Tell whether all of them have signed in."""
        here = Worker.objects.alive().filter(host=socket.gethostname(), pid__in=self.pids)
        return here.count() == self._size

    def kill_one(self) -> int:
        """Kill a worker with signal 9; return its process id."""
        victim = self._processes.pop(0)
        victim.kill()
        return victim.pid

    def check(self) -> None:
        """Raise WorkerEnded if one of them has ended by itself."""
        for process in self._processes:
            if process.status is not None:
                raise WorkerEnded(
                    f"A worker ended with status {process.status}; its log is {process.log}."
                )
