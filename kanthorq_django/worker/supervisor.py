"""Keeps several worker processes: starts them, replaces what dies, stops them together."""

import logging
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.process import run_child

logger = logging.getLogger("kanthorq_django.worker")

TICK = 0.1  # seconds between two looks at the processes
RESTART_FIRST, RESTART_LONGEST = 0.5, 30.0  # seconds before a process that died is replaced
HEALTHY_AFTER = 60.0  # seconds of life after which a death is a first one again
KILL_AFTER = 20.0  # seconds beyond the shutdown timeout


@dataclass
class _Slot:
    """The place of one process, whoever fills it."""

    process: BaseProcess | None = None
    started_at: float = field(default_factory=time.monotonic)
    restart_at: float = 0.0
    pause: float = RESTART_FIRST
    is_done: bool = False


class Supervisor:
    """``count`` worker processes. They are spawned: a fork would share sockets and locks."""

    def __init__(self, options: WorkerOptions, count: int) -> None:
        self._options = options
        self._context = multiprocessing.get_context("spawn")
        self._stop = threading.Event()
        self._slots = [_Slot() for _ in range(count)]

    def stop(self) -> None:
        """Ask for the end; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Keep the processes alive until ``stop()``, or until a burst is done in all of them."""
        try:
            while not self._stop.is_set() and not all(slot.is_done for slot in self._slots):
                for slot in self._slots:
                    self._tend(slot)
                self._stop.wait(TICK)
        finally:
            self._terminate()

    def _tend(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.is_done or (slot.process is not None and slot.process.is_alive()):
            return
        if slot.process is not None:
            self._bury(slot, now)
        elif now >= slot.restart_at:
            slot.process = self._context.Process(
                target=run_child, args=(self._options, os.getpid()), name="kanthorq-worker"
            )
            slot.process.start()
            slot.started_at = now

    def _bury(self, slot: _Slot, now: float) -> None:
        assert slot.process is not None  # noqa: S101  # for the type checker
        status, pid = slot.process.exitcode, slot.process.pid
        slot.process = None
        if status == 0:
            # A burst is over when its work is; a worker that reached max_tasks is replaced.
            slot.is_done = self._options.burst
            return
        if now - slot.started_at > HEALTHY_AFTER:
            slot.pause = RESTART_FIRST
        slot.restart_at = now + slot.pause
        logger.error(
            "worker process %s died with status %s; a new one starts in %.1f s",
            pid,
            status,
            slot.pause,
            extra={"pid": pid, "status": status},
        )
        slot.pause = min(slot.pause * 2, RESTART_LONGEST)

    def _terminate(self) -> None:
        """Let every process stop in good order, and kill what does not."""
        alive = [slot.process for slot in self._slots if slot.process is not None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + self._options.shutdown_timeout.total_seconds() + KILL_AFTER
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
