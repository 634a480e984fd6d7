"""Bytes read as values: what a fuzzer mutates becomes text, numbers and moments nobody expects.

The same bytes always become the same values, so a finding is repeated from its bytes alone.
"""

import math
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

V = TypeVar("V")

# Each of them broke something somewhere: C strings, encodings, SQL, LIKE, format(), %, terminals.
PIECES = (
    *("", " ", "\x00", "\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff"),
    *("\ud800", "\udfff", "\udcff", "\ufffd", "\U0010ffff", "\u202e", "\u200b", "\u200d", "\u2066"),
    *("e\u0301", "\u00e9", "İ", "\u0131", "ß", "\u017f", "\u212a", "٣", "²", "注文", "🛒", "א"),
    *("%", "%s", "%(a)s", "%%", "{}", "{0}", "{0.__class__}", "$1", "\\", "\\u0000", "\\x00"),
    *("'", '"', "`", "''", "';--", "' OR 1=1 --", '"; DROP TABLE x; --', "/*", "*/", "$$", "::"),
    *(".", "..", "*", ">", ".>", "*.", "(a+)+$", "[", "]", "{", "}", "<script>", "&amp;", "../"),
    *("0", "-1", "1e999", "NaN", "Infinity", "null", "true", "9" * 40, "9" * 4_301),
    *("a", "order", "order.paid", "default", "name", "x" * 80, "x" * 256, "ä" * 128),
)


class Reader:
    """Takes bytes from the front; where there are no more, everything is zero, empty or first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def below(self, limit: int) -> int:
        size = 1 if limit <= 256 else 4
        return int.from_bytes(self.take(size), "big") % limit

    def chance(self, one_in: int = 2) -> bool:
        return self.left() > 0 and self.below(one_in) == 0

    def pick(self, values: Sequence[V]) -> V:
        return values[self.below(len(values))]

    def some(self, make: Callable[[], V], most: int) -> list[V]:
        return [make() for _ in range(self.below(most + 1))]

    def text(self, pieces: Sequence[str] = PIECES, most: int = 6) -> str:
        """Return pieces and raw characters in any mixture."""
        return "".join(self.some(lambda: self._letters(pieces), most))

    def _letters(self, pieces: Sequence[str]) -> str:
        if self.chance(3):
            return self.take(self.below(12)).decode("utf-8", "surrogateescape")
        if self.chance(8):
            return chr(self.below(0x110000))
        return self.pick(pieces)

    def whole(self) -> int:
        edges = (0, 1, -1, 2, 16, 255, 256, 32_767, 32_768, 2**31, 2**53 + 1, 2**63, -(2**63))
        huge: tuple[Callable[[], int], ...] = (
            lambda: self.below(100),
            lambda: self.pick(edges),
            lambda: int.from_bytes(self.take(8), "big", signed=True),
            lambda: int(self.pick((10**30, 10**400, 10**4_300, -(10**5_000)))),
        )
        return self.pick(huge)()

    def fractional(self) -> float:
        if self.chance():
            return self.pick((0.0, -0.0, 0.1, 1.5, math.nan, math.inf, -math.inf, 1e308, 5e-324))
        return float(struct.unpack(">d", self.take(8).ljust(8, b"\x00"))[0])

    def duration(self) -> timedelta:
        if self.chance():
            edges = (timedelta(0), timedelta.max, timedelta.min, timedelta.resolution)
            return self.pick((*edges, timedelta(seconds=1), timedelta(hours=12), timedelta(-1)))
        return timedelta(microseconds=int.from_bytes(self.take(8), "big", signed=True))

    def moment(self) -> datetime:
        """Return any datetime: naive ones, and those that no other zone can tell, too."""
        zone = self.pick(
            (UTC, UTC, None, timezone(timedelta(hours=14)), timezone(-timedelta(1) / 2))
        )
        edge = self.pick((None, None, None, datetime.min, datetime.max))  # noqa: DTZ901  # as they come
        if edge is not None:
            return edge.replace(tzinfo=zone)
        day = date.fromordinal(1 + self.below(date.max.toordinal()))
        clock = (self.below(24), self.below(60), self.below(60), self.below(1_000_000))
        return datetime(day.year, day.month, day.day, *clock, tzinfo=zone)

    def likely_moment(self) -> datetime:
        """Return an aware datetime of the years that people write."""
        start = datetime(1990, 1, 1, tzinfo=UTC)
        return start + timedelta(seconds=self.below(60 * 365 * 86_400))

    def scalar(self) -> Any:
        makers: tuple[Callable[[], Any], ...] = (
            self.text,
            self.whole,
            self.fractional,
            lambda: self.pick((None, True, False)),
        )
        return self.pick(makers)()

    def anything(self) -> Any:
        """Return a value of whatever type."""
        odd: tuple[Callable[[], Any], ...] = (
            self.scalar,
            lambda: self.take(self.below(20)),
            self.moment,
            self.duration,
            lambda: UUID(bytes=self.take(16).ljust(16, b"\x00")),
            lambda: self.pick((Decimal("0.1"), Decimal("NaN"), 1j, ..., object, len, Unreadable())),
            lambda: self.pick((set(), {1: 2}, [], ["a"], (), range(3), frozenset("a"))),
            lambda: self.json(3),
        )
        return self.pick(odd)()

    def json(self, depth: int = 6) -> Any:
        """Return what JSON may be made of, and now and then what it may not."""
        kind = self.below(8) if depth else 0
        if kind < 4:
            return self.scalar()
        if kind == 4:
            return self.some(lambda: self.json(depth - 1), 4)
        if kind == 5:
            return {self.scalar(): self.json(depth - 1) for _ in range(self.below(4))}
        if kind == 6:
            return nested(self.json(0), self.below(600))
        return {self.text(): self.json(depth - 1) for _ in range(self.below(4))}


class Unreadable:
    """Its text cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__


def nested(value: Any, levels: int) -> Any:
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value
