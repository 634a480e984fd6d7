"""The handler's part of a stack: the library's frames around it are the same for every handler."""

import asyncio
import sys
import traceback
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])

Entry = tuple[FrameType, int]  # and the line that it is at

_OWN = __name__.partition(".")[0]
_LOOPS = {asyncio.Handle._run.__code__}
_callers: set[CodeType] = set()


def calls_handler(function: Function) -> Function:
    """Mark the function whose next frame is the handler's."""
    _callers.add(function.__code__)
    return function


def from_handler(error: BaseException) -> BaseException:
    """Return ``error``, its traceback cut so that it begins in the handler.

    Of what arose in the library itself the traceback is whole.
    """
    return error.with_traceback(_handlers_part(error.__traceback__))


def _handlers_part(whole: TracebackType | None) -> TracebackType | None:
    entry = found = whole
    while entry is not None and _is_own(entry.tb_frame):
        if entry.tb_frame.f_code in _callers and entry.tb_next is not None:
            found = entry.tb_next
        entry = entry.tb_next
    return whole if found is None or _is_own(found.tb_frame) else found


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == _OWN


def present_stack(thread: int | None) -> list[Entry]:
    """Return where the handler in ``thread`` is now, its outermost frame first.

    Or what the event loop runs there that no handler awaits; all there is if it runs nothing.
    """
    frame = sys._current_frames().get(thread or 0)
    whole = list(traceback.walk_stack(frame)) if frame is not None else []
    for callers in (_callers, _LOOPS):
        for place, (found, _) in enumerate(whole):
            if found.f_code in callers:
                return whole[:place][::-1]
    return whole[::-1]


def told(stack: list[Entry]) -> str:
    return "".join(traceback.StackSummary.extract(iter(stack)).format()).rstrip()
