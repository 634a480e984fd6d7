"""What is kept of a failed attempt: text that any database, log and page can take."""

import re
import traceback
from dataclasses import dataclass
from typing import Self

ERROR_SIZE_MAX = 2_000  # characters of the one-line error
# Control characters but tab and newline, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Failure:
    """``error`` is one line of what went wrong, ``stack`` its traceback, without locals."""

    error: str
    stack: str = ""

    @classmethod
    def of(cls, reason: BaseException | str, *, stack_size_max: int) -> Self:
        """Describe ``reason``, cut to size and cleansed of what PostgreSQL or a log refuses."""
        if not isinstance(reason, BaseException):
            return cls(_shortened(_cleansed(str(reason)), ERROR_SIZE_MAX))
        stack = _cleansed("".join(traceback.format_exception(reason)))
        return cls(
            _shortened(_cleansed(_one_line(reason)), ERROR_SIZE_MAX), _tail(stack, stack_size_max)
        )


def _one_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  # an exception whose own text fails must not hide itself
        text = "(its text could not be read)"
    name = type(error).__qualname__
    return f"{name}: {text}" if text else name


def _cleansed(text: str) -> str:
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def _shortened(text: str, size_max: int) -> str:
    return text if len(text) <= size_max else f"{text[: size_max - 1]}…"


def _tail(text: str, size_max: int) -> str:
    """The end of a traceback tells most."""
    return text if len(text) <= size_max else f"…{text[1 - size_max :]}"
