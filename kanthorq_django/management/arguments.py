"""Types of command-line arguments; each raises an error of one sentence."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from django.utils import timezone
from django.utils.dateparse import parse_datetime

from kanthorq_django.domain.moments import with_offset
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.management.times import parse_duration

V = TypeVar("V")


def duration(text: str) -> timedelta:
    """Return a duration such as ``7d``, ``12h``, ``30m`` or ``90s``."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def event_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{quoted(text)} is not an event id; it must be a UUID.") from error


def moment(text: str) -> datetime:
    """Return an ISO 8601 time with an offset: a naive one would mean another moment elsewhere."""
    try:
        parsed = parse_datetime(text)
    except ValueError:
        parsed = None
    if parsed is None:
        raise ArgumentTypeError(
            f"{quoted(text)} is not a time; write it as 2026-12-24T18:00+01:00, or with Z for UTC."
        )
    if timezone.is_naive(parsed):
        raise ArgumentTypeError(
            f"{quoted(text)} has no offset; write it as {with_offset(parsed)}, or with Z for UTC."
        )
    return parsed


def count(lowest: int, highest: int) -> Callable[[str], int]:
    """Return a type for whole numbers from ``lowest`` to ``highest``."""
    return _within(int, lowest, highest, "a whole number")


def fraction(text: str) -> float:
    """Return a number from 0 to 1."""
    return _within(float, 0, 1, "a number")(text)


def _within(kind: Callable[[str], V], lowest: Any, highest: Any, noun: str) -> Callable[[str], V]:
    def parse(text: str) -> V:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not lowest <= number <= highest:
            raise ArgumentTypeError(
                f"{quoted(text)} must be {noun} from {lowest:,} to {highest:,}."
            )
        return number

    return parse
