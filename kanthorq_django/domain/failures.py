"""What is kept of a failed attempt: text that any database, log and page can take."""

import json
import re
import traceback
from dataclasses import dataclass
from typing import Any, Self

from kanthorq_django.domain.interrupts import is_interrupt
from kanthorq_django.domain.quoting import cut

LINE_SIZE_MAX = 2_000  # characters of the one-line error
# Control characters but tab and newline, halves of surrogate pairs, and what turns the
# direction of text around.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """``error`` is one line of what went wrong, ``stack`` its traceback, without locals."""

    error: str
    stack: str = ""

    @classmethod
    def of(cls, reason: BaseException | str, *, stack_size_max: int) -> Self:
        """Describe ``reason``, cut to size and cleansed of what PostgreSQL or a log refuses."""
        if not isinstance(reason, BaseException):
            return cls(one_line(_text(reason)))
        text = _text(reason)
        name = type(reason).__qualname__
        stack = _tail(_stack(reason), stack_size_max)
        return cls(one_line(f"{name}: {text}" if text else name), _cleansed(stack))


def recorded(history: object) -> list[dict[str, Any]]:
    """Return the failures in ``attempted_errors``, the oldest first, whatever was stored there.

    Each has an ``error`` and a ``stack``, which are text, and what else was stored with them.
    Without an error of its own, the error is all that was stored, as JSON.
    """
    entries = history if isinstance(history, list) else [history] if history else []
    return [_recorded(entry) for entry in entries]


def one_line(text: str, size_max: int = LINE_SIZE_MAX) -> str:
    """Return ``text`` as one line of at most ``size_max`` characters, safe to store and to log."""
    return _cleansed(" ".join(cut(text, size_max).split()))


def _recorded(entry: object) -> dict[str, Any]:
    told = entry if isinstance(entry, dict) else {}
    error, stack = told.get("error", entry), told.get("stack") or ""
    return told | {"error": _spelled(error), "stack": _spelled(stack)}


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(reason: object) -> str:
    try:
        return str(reason)
    except BaseException as error:  # an exception whose own text fails must not hide itself
        if is_interrupt(error):
            raise
        return "(its text could not be read)"


def _stack(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as failure:  # it reads attributes of the exception, which may fail
        if is_interrupt(failure):
            raise
        return "(its traceback could not be read)"


def _cleansed(text: str) -> str:
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def _tail(text: str, size_max: int) -> str:
    """The end of a traceback tells most."""
    return text if len(text) <= size_max else f"…{text[len(text) - size_max + 1 :]}"
