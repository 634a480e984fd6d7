"""Keeps several worker processes: starts them, replaces what dies, stops them together."""

import contextlib
import multiprocessing
import multiprocessing.util  # registers its exit hook, which joins, before ours, which stops
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from django.db import connections

from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.process import KILL_AFTER, REFUSED, SUPERVISOR_GRACE, run_child

TICK = 0.1  # seconds between two looks at the processes
RESTART_FIRST, RESTART_LONGEST = 0.5, 30.0  # seconds before a process that died is replaced
HEALTHY_AFTER = 60.0  # seconds of life after which a death is a first one again


@dataclass
class _Slot:
    """The place of one process, whoever fills it."""

    process: BaseProcess | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    pause: float = RESTART_FIRST
    is_done: bool = False
    is_refused: bool = False


class Supervisor:
    """``count`` worker processes. They are spawned: a fork would share sockets and locks."""

    def __init__(self, options: WorkerOptions, count: int) -> None:
        self._options = options
        self._context = multiprocessing.get_context("spawn")
        # In a test they are not those of the settings, which a child reads for itself.
        self._databases = {alias: connections[alias].settings_dict["NAME"] for alias in connections}
        self._stop = threading.Event()
        self._slots = [_Slot() for _ in range(count)]

    @property
    def patience(self) -> float:
        """How many seconds the end may take after ``stop()``."""
        return self._options.shutdown_timeout.total_seconds() + SUPERVISOR_GRACE

    def stop(self) -> None:
        """Ask for the end."""
        self._stop.set()

    def kill(self) -> None:
        """End every process at once; safe in a signal handler."""
        for slot in self._slots:
            if slot.process is not None:
                with contextlib.suppress(Exception):  # not started yet, or gone already
                    slot.process.kill()

    def run(self) -> None:
        """Keep the processes alive until ``stop()``, or until a burst is done in all of them.

        Raises KanthorqError when a process could not do its part of a burst; it said why.
        """
        try:
            while not self._stop.is_set() and not all(slot.is_done for slot in self._slots):
                for slot in self._slots:
                    self._tend(slot)
                self._stop.wait(TICK)
        finally:
            self._terminate()
        if any(slot.is_refused for slot in self._slots):
            raise KanthorqError("A worker process refused to go on; the log says why.")

    def _tend(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.is_done or (slot.process is not None and slot.process.is_alive()):
            return
        if slot.process is not None:
            self._bury(slot, now)
        elif now >= slot.restart_at:
            self._start(slot, now)

    def _start(self, slot: _Slot, now: float) -> None:
        process = self._context.Process(
            target=run_child,
            args=(self._options, os.getpid(), self._databases),
            name="kanthorq-worker",
        )
        try:
            _spawn(process)
        except OSError as error:
            logger.error("no worker process could be started: %s", error)  # noqa: TRY400  # it says all
            self._postpone(slot, now)
        else:
            slot.process, slot.started_at = process, now

    def _bury(self, slot: _Slot, now: float) -> None:
        assert slot.process is not None  # noqa: S101  # for the type checker
        status, pid = slot.process.exitcode, slot.process.pid
        slot.process = None
        if status == 0 or (status == REFUSED and self._options.burst):
            # A burst is over when its work is; a worker that reached max_tasks is replaced.
            slot.is_done = self._options.burst
            slot.is_refused = status == REFUSED
            return
        if now - slot.started_at > HEALTHY_AFTER:
            slot.pause = RESTART_FIRST
        pause = self._postpone(slot, now)
        logger.error(
            "worker process %s died with status %s; a new one starts in %.1f s",
            pid,
            status,
            pause,
            extra={"pid": pid, "status": status},
        )

    def _postpone(self, slot: _Slot, now: float) -> float:
        pause, slot.pause = slot.pause, min(slot.pause * 2, RESTART_LONGEST)
        slot.restart_at = now + pause
        return pause

    def _terminate(self) -> None:
        """Let every process stop in good order, and kill what does not."""
        alive = [slot.process for slot in self._slots if slot.process is not None]
        for process in alive:
            process.terminate()
        patience = self._options.shutdown_timeout.total_seconds() + KILL_AFTER
        deadline = time.monotonic() + patience
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _spawn(process: BaseProcess) -> None:
    """Start ``process``. Raises OSError where the system has no room for it."""
    # Blocked signals stay blocked in the child, until it is ready to ignore Ctrl-C. The
    # tracker comes first: whoever starts it finds these signals unblocked afterwards.
    resource_tracker.ensure_running()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
