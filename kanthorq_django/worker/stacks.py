"""The handler's part of a stack: the library's frames around it are the same for every handler."""

import sys
import traceback
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])

_OWN = __name__.partition(".")[0]
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


def present_stack(thread: int | None) -> traceback.StackSummary:
    """Return where the handler in ``thread`` is now, all of the thread's if that is in none."""
    frame = sys._current_frames().get(thread or 0)
    whole = list(traceback.walk_stack(frame)) if frame is not None else []
    places = [place for place, (found, _) in enumerate(whole) if found.f_code in _callers]
    part = whole[: places[0]] if places else whole
    return traceback.StackSummary.extract(iter(part[::-1]))
