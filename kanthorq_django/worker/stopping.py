"""How a worker process ends: in good order when it is asked to, or else without its threads."""

import atexit
import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from kanthorq_django.worker.log import logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_WORDS = 1.0  # seconds for a log that does not take what there is to say
RELOAD_GRACE = 5.0  # seconds that a code reloader may have to wait for running handlers


@contextlib.contextmanager
def stop_on_signals(
    stop: Callable[[], None],
    *,
    patience: float,
    at_once: Callable[[], None] | None = None,
    numbers: tuple[signal.Signals, ...] = STOP_SIGNALS,
    heeds_second: bool = True,
) -> Iterator[Callable[[], float]]:
    """Call ``stop`` on the first signal; on the second call ``at_once`` and leave.

    Unless ``heeds_second`` is False: then the first one alone counts. Yields a function that
    returns how many seconds of ``patience`` are left: all of them where no signal has come.

    The process also leaves, with status 1, when the block has not ended ``patience`` seconds
    after the first signal, whatever keeps it: a log that nobody reads keeps each thread that
    says something. Neither may the interpreter take longer to exit after the block. Outside of
    the main thread, as under a code reloader, signals are left alone, and ``stop`` is called
    when the interpreter exits.
    """
    if threading.current_thread() is not threading.main_thread():
        with _stop_at_exit(stop):
            yield lambda: patience
        return
    signals = _Signals(stop, patience, at_once, heeds_second=heeds_second)
    former = {number: signal.signal(number, signals.arrive) for number in numbers}
    threading.Thread(target=signals.relay, name="kanthorq-signals", daemon=True).start()
    try:
        yield signals.left
    finally:
        signals.end()
        for number, handler in former.items():
            signal.signal(number, handler)


class _Signals:
    """Hands the first signal to a thread, and leaves on the second.

    A signal handler runs between two bytecodes of the main thread, which may just hold the
    lock of the very Event that is to be set. A SimpleQueue may be put into at any moment.
    """

    def __init__(
        self,
        stop: Callable[[], None],
        patience: float,
        at_once: Callable[[], None] | None,
        *,
        heeds_second: bool,
    ) -> None:
        self._stop = stop
        self._heeds_second = heeds_second
        self._patience = patience
        self._at_once = at_once
        self._deadline: float | None = None  # once the first one has arrived
        self._arrivals: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ended = threading.Event()

    def arrive(self, number: int, _: FrameType | None) -> None:
        if self._deadline is not None:
            if not self._heeds_second:
                return
            if self._at_once is not None:
                self._at_once()
            os._exit(128 + number)
        self._deadline = time.monotonic() + self._patience
        self._arrivals.put(True)

    def relay(self) -> None:
        if self._arrivals.get():
            self._stop()
            if not self._ended.wait(self._patience):
                if self._at_once is not None:
                    self._at_once()
                leave(1, "It took too long to stop in good order.")

    def left(self) -> float:
        if self._deadline is None:
            return self._patience
        return max(0.0, self._deadline - time.monotonic())

    def end(self) -> None:
        self._ended.set()
        self._arrivals.put(False)
        if self._deadline is not None:
            atexit.register(_exit_until, self._deadline)


def _exit_until(deadline: float) -> None:
    """Let the kernel end this process then, as no thread may begin while the interpreter exits.

    It waits for the locks of the log, which a thread may hold that nobody hears.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(LAST_WORDS, deadline - time.monotonic()))


@contextlib.contextmanager
def _stop_at_exit(stop: Callable[[], None]) -> Iterator[None]:
    ended = threading.Event()

    def farewell() -> None:
        stop()
        ended.wait(RELOAD_GRACE)

    atexit.register(farewell)
    try:
        yield
    finally:
        ended.set()
        atexit.unregister(farewell)


def ready_to_end() -> Callable[[float], None]:
    """Return what lets no thread that a handler left behind keep this process for longer.

    The interpreter waits for those that are no daemons, and for those of ``concurrent.futures``
    whatever they are, before it calls anything that was registered for its exit. The thread that
    ends it begins now: when handlers have used up the memory, Python waits for ever for one to
    begin.
    """
    done: queue.SimpleQueue[float] = queue.SimpleQueue()

    def end() -> None:
        threading.Event().wait(done.get())
        names = {each.name for each in threading.enumerate() if not each.daemon}
        names.discard(threading.main_thread().name)
        left = f": {', '.join(sorted(names))}" if names else ""
        leave(0, f"Threads that handlers left behind do not end{left}.")

    threading.Thread(target=end, name="kanthorq-end", daemon=True).start()
    return done.put


def leave(status: int, last_words: str = "") -> NoReturn:
    """End this process without waiting for its threads, nor for ever for whoever reads its log."""
    with contextlib.suppress(RuntimeError):  # there can be no more threads
        farewell = threading.Thread(target=_say_last, args=(last_words,), daemon=True)
        farewell.start()
        farewell.join(LAST_WORDS)
    os._exit(status)


def _say_last(words: str) -> None:
    with contextlib.suppress(Exception):
        if words:
            logger.error(words)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
