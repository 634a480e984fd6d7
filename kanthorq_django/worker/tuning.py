"""How Python itself is set while a worker runs: its garbage collector and its threads' turns."""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

COLLECT_EVERY = 60.0  # seconds
COLLECT_AFTER = 30_000  # objects more than there were; Python's default is 700 or 2,000
SWITCH_EVERY = 0.001  # seconds; Python's default is 0.005


@contextlib.contextmanager
def rarely_collecting() -> Iterator[None]:
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
def switching_often() -> Iterator[None]:
    """Let threads wait less long for the interpreter's lock: the puller waits for it many times.

    Each answer of the database finds handlers at work.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, SWITCH_EVERY))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
