"""The entry into a worker process: signals, and what a spawned child has to do first.

No models are imported up here: a spawned child reads this module before Django is set up.
"""

import atexit
import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NoReturn

from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.options import WorkerOptions

PARENT_CHECKED_EVERY = 1.0  # seconds
# Seconds beyond the shutdown timeout: whoever is to stop has ended after 15 of them. Of several
# processes each ends itself before its supervisor would kill it, and that one ends after that.
GRACE = 12.0  # for a database that does not answer
LAST_WORDS = 1.0  # more, for a log that does not take what there is to say
KILL_AFTER = GRACE + LAST_WORDS + 0.5
SUPERVISOR_GRACE = KILL_AFTER + 0.5
RELOAD_GRACE = 5.0  # seconds that a code reloader may have to wait for running handlers
REFUSED = 78  # status of a child that would refuse again; EX_CONFIG of sysexits.h

COLLECT_EVERY = 60.0  # seconds
COLLECT_AFTER = 30_000  # objects more than there were; Python's default is 700 or 2,000
SWITCH_EVERY = 0.001  # seconds; Python's default is 0.005

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_process(
    options: WorkerOptions, tell: Callable[[int], None], *, is_all: bool = False
) -> None:
    """Run one worker in this process until it is done; tell how many handlers it started.

    ``is_all`` says that the process is to do nothing else. Raises as ``WorkerLoop.run()``. Does
    not return when handlers outlive the shutdown timeout: the interpreter would wait for what
    they started.
    """
    _run(options, tell, is_all=is_all)


def run_child(options: WorkerOptions, parent_pid: int, databases: Mapping[str, str]) -> None:
    """Run one worker in a spawned child, and stop when its supervisor is gone.

    ``databases`` are the names of the supervisor's, by alias.
    """
    # Ctrl-C reaches the whole process group; the supervisor alone decides about the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    import django
    from django.db import OperationalError, connections

    django.setup()
    for alias in databases.keys() & connections.settings.keys():  # a deployment may remove one
        connections.settings[alias]["NAME"] = databases[alias]
    _watch_parent(parent_pid)
    try:
        _run(options, is_child=True, is_all=True)
    except KanthorqError as error:
        logger.error("%s", error)  # noqa: TRY400  # a traceback would not tell more
        sys.exit(REFUSED)
    except OperationalError as error:
        logger.error("The database cannot be reached: %s", " ".join(str(error).split()))  # noqa: TRY400  # nor here
        sys.exit(1)


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
                _leave(1, "It took too long to stop in good order.")

    def left(self) -> float:
        if self._deadline is None:
            return self._patience
        return max(0.0, self._deadline - time.monotonic())

    def end(self) -> None:
        self._ended.set()
        self._arrivals.put(False)
        if self._deadline is not None:
            atexit.register(_exit_until, self._deadline)


def _run(
    options: WorkerOptions,
    tell: Callable[[int], None] | None = None,
    *,
    is_child: bool = False,
    is_all: bool = False,
) -> None:
    from kanthorq_django.worker.loop import WorkerLoop
    from kanthorq_django.worker.scarcity import expect_small_pools
    from kanthorq_django.worker.upkeep import expect_dead_hosts

    expect_dead_hosts()
    expect_small_pools(options.concurrency)
    loop = WorkerLoop(options)
    patience = options.shutdown_timeout.total_seconds() + GRACE
    # A service manager may send SIGTERM to all of the group, and then the supervisor does: a
    # child that took that for a second signal would leave its handlers in the middle.
    numbers = (signal.SIGTERM,) if is_child else STOP_SIGNALS
    stopping = stop_on_signals(
        loop.stop, patience=patience, numbers=numbers, heeds_second=not is_child
    )
    end_within = _ready_to_end() if is_all else None
    with stopping as left, _rarely_collecting(), _switching_often():
        count = loop.run()
        if loop.has_stragglers:
            loop.tell_stragglers()
        if loop.has_stragglers or loop.has_failed:
            _leave(int(loop.has_failed))
        if tell is not None:
            tell(count)
        if end_within is not None:
            end_within(left())


@contextlib.contextmanager
def _rarely_collecting() -> Iterator[None]:
    """Let the garbage collector look at what handlers leave, seldom, and at nothing older.

    A worker holds thousands of leased tasks, each a few objects without cycles. By default the
    collector goes through all of them, and all of the project's code, again and again: a fourth
    of the time that a worker takes for a task. A worker that does little would on the other hand
    keep what its errors left for days, so all is looked at once a minute, too.
    """
    young, *older = gc.get_threshold()
    if not gc.isenabled() or not young:  # the project sees to it
        yield
        return
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(COLLECT_EVERY):
            gc.collect()

    gc.freeze()
    gc.set_threshold(max(young, COLLECT_AFTER), *older)
    threading.Thread(target=collect, name="kanthorq-collector", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        gc.set_threshold(young, *older)
        gc.unfreeze()


@contextlib.contextmanager
def _switching_often() -> Iterator[None]:
    """Let threads wait less long for the interpreter's lock: the puller waits for it many times.

    Each answer of the database finds handlers at work.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, SWITCH_EVERY))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _leave(status: int, last_words: str = "") -> NoReturn:
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


def _ready_to_end() -> Callable[[float], None]:
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
        _leave(0, f"Threads that handlers left behind do not end{left}.")

    threading.Thread(target=end, name="kanthorq-end", daemon=True).start()
    return done.put


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


def _watch_parent(parent_pid: int) -> None:
    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent_pid:
            pause.wait(PARENT_CHECKED_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="kanthorq-parent-watch", daemon=True).start()
