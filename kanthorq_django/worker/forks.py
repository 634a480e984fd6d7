"""Processes that a handler forks in a thread which somebody else looks after: an executor's.

Such as ``sync_to_async()`` and ``asyncio.to_thread()`` use. The child has a copy of that thread
alone, and of the parent's connections. When what forked has returned, it would wait for the
executor's next call, which nobody will ever make, and keep the connections open. What a plain
handler or a coroutine forks itself executor.py ends.
"""

import functools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any


@functools.cache
def end_forked_executors() -> None:
    """Have children of this process end where what forked them returns to an executor.

    One that never returns is left alone, as multiprocessing's; and fork hooks do not run where
    a program is started.
    """
    os.register_at_fork(after_in_child=_end_at_return)


def _end_at_return() -> None:
    for future in _awaited(sys._getframe()):
        future.set_result = future.set_exception = _leave


def _awaited(frame: FrameType | None) -> Iterator[Any]:
    """Find the futures of the calls that this thread is in: concurrent.futures' and asgiref's."""
    item: Any
    while frame is not None:
        if frame.f_code.co_name == "run":
            item = frame.f_locals.get("self")
            if type(item).__name__ == "_WorkItem" and isinstance(item.future, Future):
                yield item.future
        frame = frame.f_back


def _leave(_: object) -> None:
    os._exit(1)
