"""Notices a coroutine that keeps the event loop to itself, such as by ``time.sleep()``."""

import math
import threading
import time
from collections.abc import Callable
from types import CodeType

from kanthorq_django.worker.log import logger
from kanthorq_django.worker.stacks import present_stack, told

LOOK_EVERY = 0.5  # seconds
BLOCKED_AFTER = 1.0  # seconds in which all coroutines get their turn many times


class LoopWatch:
    """A thread that asks the event loop in ``thread`` for an answer; it tells of each name once."""

    def __init__(
        self,
        thread: threading.Thread,
        call_soon: Callable[[Callable[[], object]], None],
        is_idle: Callable[[], bool],
    ) -> None:
        self._loop_thread = thread
        self._call_soon = call_soon
        self._is_idle = is_idle
        self.silent_since = math.inf  # when it was first seen to give no answer, if it still is
        self._stop = threading.Event()
        self._told: set[CodeType] = set()
        self._thread = threading.Thread(target=self._run, name="kanthorq-loop-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def finish(self, seconds: float) -> None:
        """Wait for the thread to end, after ``stop()``."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY):
            try:
                if not self._is_idle():
                    self._look()
            except Exception:
                logger.exception("The watch over the event loop failed; it goes on.")

    def _look(self) -> None:
        answered = threading.Event()
        self._call_soon(answered.set)
        if answered.wait(BLOCKED_AFTER / 2):
            self.silent_since = math.inf
            return
        # By when that was seen: a process that was frozen has not been silent all the time.
        self.silent_since = min(self.silent_since, time.monotonic())
        before = present_stack(self._loop_thread.ident)
        if answered.wait(BLOCKED_AFTER / 2):
            return
        now = present_stack(self._loop_thread.ident)
        # Else nobody blocks it for long: there are many, and they take turns.
        if before and now and before[0][0] is now[0][0]:
            frame, _ = now[0]
            self._tell(frame.f_code, f"{frame.f_globals.get('__name__')}", told(now))

    def _tell(self, code: CodeType, module: str, where: str) -> None:
        if code not in self._told:
            self._told.add(code)
            logger.warning(
                "%s.%s blocks the event loop, so all coroutines of this process wait for it. It "
                "is here:\n%s",
                module,
                code.co_qualname,
                where,
            )
