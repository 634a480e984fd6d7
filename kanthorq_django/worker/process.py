"""The entry into a worker process: signals, and what a spawned child has to do first.

No models are imported up here: a spawned child reads this module before Django is set up.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from kanthorq_django.worker.options import WorkerOptions

PARENT_CHECKED_EVERY = 1.0  # seconds


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on the first SIGTERM or SIGINT, and leave at once on the second.

    A handler runs between two bytecodes of whatever the main thread does, so it only sets a
    flag. Outside of the main thread, as under a code reloader, signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_stopping = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            os._exit(128 + number)
        is_stopping = True
        stop()

    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def run_process(options: WorkerOptions) -> int:
    """Run one worker in this process until it is done; return how many handlers it started."""
    from kanthorq_django.worker.loop import WorkerLoop

    loop = WorkerLoop(options)
    with stop_on_signals(loop.stop):
        return loop.run()


def run_child(options: WorkerOptions, parent_pid: int) -> None:
    """Run one worker in a spawned child, and stop when its supervisor is gone."""
    import django

    django.setup()
    from kanthorq_django.worker.loop import WorkerLoop

    loop = WorkerLoop(options)
    # Ctrl-C reaches the whole process group; the supervisor alone decides about the end.
    with stop_on_signals(loop.stop):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _watch_parent(parent_pid, loop.stop)
        loop.run()
    sys.exit(0)


def _watch_parent(parent_pid: int, stop: Callable[[], None]) -> None:
    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent_pid:
            pause.wait(PARENT_CHECKED_EVERY)
        stop()

    threading.Thread(target=watch, name="kanthorq-parent-watch", daemon=True).start()
