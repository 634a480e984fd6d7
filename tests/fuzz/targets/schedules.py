"""Recurrence rules and the definitions of schedules: every search ends, and in order."""

from collections.abc import Callable
from datetime import UTC, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

from django.core.exceptions import ValidationError

from kanthorq_django.admin.schedule_fields import local_moment
from kanthorq_django.domain.recurrence import Recurrence
from kanthorq_django.domain.rules import RecurrenceProblem, parse
from kanthorq_django.domain.wording import in_words
from kanthorq_django.exceptions import InvalidBody, InvalidEvent, InvalidSchedule
from kanthorq_django.models import Schedule
from kanthorq_django.models.scheduling.definition import Definition
from tests.fuzz.oracle import refusals
from tests.fuzz.reader import PIECES, Reader

ZONES = ("UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Apia", "Australia/Lord_Howe")
FREQUENCIES = ("DAILY", "WEEKLY", "MONTHLY", "YEARLY", "HOURLY", "MINUTELY", "SECONDLY", "daily")
DAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU", "1MO", "-1SU", "5FR", "53MO", "0TU", "+2WE", "XX")
ENDS = ("20301231", "20301231T235959Z", "99991231T235959Z", "00010101", "20261301", "x")
PARTS: dict[str, tuple[int, int]] = {
    "BYMONTH": (-1, 13),
    "BYMONTHDAY": (-32, 32),
    "BYYEARDAY": (-367, 367),
    "BYWEEKNO": (-54, 54),
    "BYHOUR": (-1, 24),
    "BYMINUTE": (-1, 60),
    "BYSECOND": (-1, 60),
    "BYSETPOS": (-367, 367),
    "INTERVAL": (-1, 1_001),
    "COUNT": (0, 10_001),
}


def rules(reader: Reader) -> None:
    """A rule is refused in words, or its occurrences are found, in order, and not before."""
    text = reader.text() if reader.chance(8) else _rule(reader)
    zone = ZoneInfo(reader.pick(ZONES))
    start = reader.likely_moment()
    left_out = frozenset(reader.some(reader.likely_moment, 2))
    with refusals(RecurrenceProblem):
        recurrence = Recurrence(text, start, zone, left_out)
        moment = reader.likely_moment()
        found = list(islice(recurrence.occurrences(moment), 3))
        assert found == sorted(set(found))
        assert all(each > moment and each >= recurrence.dtstart for each in found)
        assert not left_out & set(found)
        if found:
            assert recurrence.latest(found[-1], found[-1] - timedelta(1)) == found[-1]
        assert in_words(recurrence.parts, start.astimezone(zone).replace(tzinfo=None)).isprintable()
        assert parse(text) == recurrence.parts


def definitions(reader: Reader) -> None:
    """What code says about a schedule, of whatever type, is kept or refused before any SQL."""
    given: dict[str, Any] = {
        "rrule": _rule(reader),
        "dtstart": reader.likely_moment(),
        "timezone": reader.pick((None, *ZONES)),
        "exdates": reader.some(reader.likely_moment, 2),
        "subject": "report.due",
        "body": b"",
        "metadata": None,
        "stream": "default",
        "resource_key": "",
        "catchup": "last",
    }
    makers: tuple[Callable[[], Any], ...] = (reader.anything, reader.text, reader.moment)
    for name in given:
        if reader.chance(5):
            given[name] = reader.pick(makers)()
        elif name == "exdates" and reader.chance(5):
            given[name] = reader.some(reader.anything, 3)
    with refusals(InvalidSchedule, InvalidEvent, InvalidBody):
        columns = Definition(**given).columns()
        kept = Schedule(name=reader.pick(("report", reader.text())), **columns)
        kept.check_definition()
        kept.next_at = kept.upcoming_from(reader.likely_moment())
        assert all(kept.local(moment).tzinfo for moment in kept.upcoming())
        for exdate in kept.recurrence().exdates:
            kept.local(exdate)  # pages and commands show them
        assert kept.in_words()


def form_moments(reader: Reader) -> None:
    """What people type as a time is one, or is refused beside its field."""
    text = reader.text(("2026", "-", "12", "24", "T", " ", ":", "09", "00", "Z", "+01:00", *PIECES))
    with refusals(ValidationError):
        moment = local_moment(text)
        assert moment.tzinfo is None
        moment.replace(tzinfo=UTC).astimezone(ZoneInfo(reader.pick(ZONES)))


def _rule(reader: Reader) -> str:
    parts = [f"FREQ={reader.pick(FREQUENCIES)}"]
    for name, bounds in PARTS.items():
        if reader.chance(5):
            parts.append(f"{name}={_numbers(reader, name, *bounds)}")
    days = ",".join(reader.pick(DAYS) for _ in range(1 + reader.below(3)))
    others = (f"BYDAY={days}", f"WKST={reader.pick(DAYS)}", f"UNTIL={reader.pick(ENDS)}")
    parts += [part for part in others if reader.chance(5)]
    if reader.chance(10):
        parts.insert(reader.below(len(parts)), reader.text())
    return ";".join(parts)


def _numbers(reader: Reader, name: str, lowest: int, highest: int) -> str:
    most = 1 if name in ("INTERVAL", "COUNT") else 4
    numbers = [lowest + reader.below(highest - lowest + 1) for _ in range(1 + reader.below(most))]
    return ",".join(map(str, numbers))
