"""Opaque bytes made readable: as JSON, as text, or as a hex dump, and never too much of them.

Values of ``KANTHORQ["REDACTED_KEYS"]`` are not shown.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kanthorq_django.admin.display import visible
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.redaction import REPLACEMENT, redact
from kanthorq_django.domain.secret_keys import first_mention

READ_MAX = 65_536  # bytes of a body that a page reads
SHOWN_MAX = 262_144  # characters of a page's text; indenting can make much of little
DUMPED_MAX = 4_096  # bytes of a hex dump
_INDENT = "  "
_OPENING, _CLOSING = ("{", "["), ("}", "]")
# Strings as they were written, structure, and the rest: numbers and words.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')
_LINE_SIZE = 16  # bytes


@dataclass(frozen=True, slots=True)
class Content:
    """``text`` to show; its kind is ``json``, ``text``, ``hex`` or ``empty``."""

    kind: str
    text: str
    is_cut: bool


def describe(start: bytes, size: int) -> Content:
    """Make ``start`` readable, the first at most ``READ_MAX`` bytes of ``size`` in all."""
    if not size:
        return Content("empty", "", is_cut=False)
    text = _decoded(start, is_whole=len(start) == size)
    if text is None:
        return _dump(start[:DUMPED_MAX], size)
    if len(start) == size and _is_json(text):
        shown = pretty(redacted(text))
        return Content("json", shown, is_cut=len(shown) >= SHOWN_MAX)
    shown = visible(redacted(text.replace("\r\n", "\n")))[:SHOWN_MAX]
    return Content("text", shown, is_cut=len(start) < size or len(shown) == SHOWN_MAX)


def pretty(text: str) -> str:
    """Return JSON ``text`` indented, each token as it was written, cut at ``SHOWN_MAX`` characters.

    A parser would round long numbers, drop repeated keys and spell escapes out.
    """
    pieces = itertools.chain.from_iterable(_indented(text))
    return visible("".join(_first(pieces, SHOWN_MAX)))[:SHOWN_MAX]


def redacted(text: str) -> str:
    """Return ``text`` without the values that the settings keep from pages."""
    return redact(text, get_settings().REDACTED_KEYS)


def redacted_error(text: str) -> str:
    """Return the text of an exception, or its traceback, without those values, fit to be shown."""
    return visible(redact(text, get_settings().REDACTED_KEYS, is_error=True))


def pretty_value(value: object) -> str:
    """Return a JSON value as a page shows it."""
    return pretty(redacted(json.dumps(value, ensure_ascii=False)))


def _decoded(start: bytes, *, is_whole: bool) -> str | None:
    """Return the text, or None when these bytes are none; a cut may go through a character."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start, final=is_whole)
    except UnicodeDecodeError:
        return None
    has_controls = any(character < " " and character not in "\t\n\r" for character in text)
    return None if has_controls else text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _indented(text: str) -> Iterator[tuple[str, ...]]:
    depth, former = 0, ""
    for found in _TOKEN.finditer(text):
        piece = found.group()
        depth -= piece in _CLOSING
        yield (_gap(former, piece, depth), piece)
        depth += piece in _OPENING
        former = piece


def _gap(former: str, piece: str, depth: int) -> str:
    if former in _OPENING and piece in _CLOSING:
        return ""
    if former in _OPENING or former == "," or piece in _CLOSING:
        return "\n" + _INDENT * depth
    return " " if former == ":" else ""


def _first(pieces: Iterator[str], size_max: int) -> Iterator[str]:
    size = 0
    for piece in pieces:
        yield piece
        size += len(piece)
        if size >= size_max:
            return


def _dump(start: bytes, size: int) -> Content:
    """Dump bytes up to the first secret key: nobody knows where its value ends."""
    end = first_mention(start, get_settings().REDACTED_KEYS)
    if end is None:
        return Content("hex", _hex_dump(start), is_cut=size > len(start))
    return Content("hex", f"{_hex_dump(start[:end])}\n{REPLACEMENT}", is_cut=size > end)


def _hex_dump(data: bytes) -> str:
    return "\n".join(
        _hex_line(offset, data[offset : offset + _LINE_SIZE])
        for offset in range(0, len(data), _LINE_SIZE)
    )


def _hex_line(offset: int, data: bytes) -> str:
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)  # noqa: PLR2004  # ASCII
    return f"{offset:08x}  {data.hex(' '):<{_LINE_SIZE * 3}} {letters}"
