"""Processes that a handler forks: each has a copy of its thread alone, and of all connections.

One that is still there when its handler has returned is no second worker, and ends. So does one
that was forked in a thread which somebody else looks after, an executor's, such as
``sync_to_async()`` and ``asyncio.to_thread()`` use: it would wait for the executor's next call,
which nobody will ever make, and keep the connections open.
"""

import functools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any

depth = 0  # forks that lead from the process which began to this one


def _note_fork() -> None:
    global depth  # noqa: PLW0603  # to ask for the process's id, thrice a task, takes far longer
    depth += 1


os.register_at_fork(after_in_child=_note_fork)


def leave_as_child_of(parent_depth: int) -> None:
    """End this process if it is one that was forked since ``depth`` was ``parent_depth``.

    At once, before it is through with any block of ours: it has its parent's connections.
    """
    if depth != parent_depth:
        os._exit(1)


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
