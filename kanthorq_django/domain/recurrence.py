"""Recurrence rules (RFC 5545): when a schedule occurs, in local time, within bounded work.

A rule is evaluated in the wall-clock time of its zone, so 09:00 stays 09:00 across both
changes of the clock. A local time that a change skips moves forward by the gap (02:30
becomes 03:30), one that occurs twice is taken the first time. Every search ends: frequencies
and counts are limited, the rule is moved up before searching, and a horizon bounds what may
lie ahead.
"""

import re
from calendar import monthrange
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import MAXYEAR, UTC, datetime, time, timedelta
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from dateutil.rrule import rrulestr

COUNT_MAX = 10_000
INTERVAL_MAX = 1_000
TEXT_SIZE_MAX = 500  # characters
# The longest wait that a calendar can ask for: 29 February on a given weekday, across 2100.
HORIZON_YEARS = 41
HORIZON = timedelta(days=366 * HORIZON_YEARS)
LEAP_YEAR = 2024
YEAR_MAX = 3000
# A change of the clock can swap the order of two local times that are no further apart.
GAP_MAX = timedelta(hours=3)
DAYS_TRIED_MAX = 1_500  # matching days without a matching time, in one search

_STEPS = {"HOURLY": timedelta(hours=1), "MINUTELY": timedelta(minutes=1)}
_MOVABLE = _STEPS | {"DAILY": timedelta(days=1), "WEEKLY": timedelta(weeks=1)}
_FREQUENCIES = ("YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY")
_DAY_PARTS = ("BYMONTH", "BYMONTHDAY", "BYYEARDAY", "BYDAY")
_RANGES = {
    "BYSECOND": range(60),
    "BYMINUTE": range(60),
    "BYHOUR": range(24),
    "BYMONTHDAY": (*range(-31, 0), *range(1, 32)),
    "BYYEARDAY": (*range(-366, 0), *range(1, 367)),
    "BYWEEKNO": (*range(-53, 0), *range(1, 54)),
    "BYMONTH": range(1, 13),
    "BYSETPOS": (*range(-366, 0), *range(1, 367)),
}
_WEEKDAY = re.compile(r"([+-]?\d{1,2})?(MO|TU|WE|TH|FR|SA|SU)")
_UNTIL = re.compile(r"\d{8}(T\d{6}Z?)?")


class RecurrenceProblem(ValueError):
    """A rule that is malformed, goes beyond a limit, or never occurs."""


@dataclass(frozen=True)
class Recurrence:
    """A rule, its first moment, the zone whose clocks it follows, and the moments left out.

    Raises RecurrenceProblem, in words, for a rule that cannot be used.
    """

    rule: str
    dtstart: datetime  # aware
    zone: ZoneInfo
    exdates: frozenset[datetime] = frozenset()  # aware
    parts: dict[str, str] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtstart.year > YEAR_MAX:
            raise RecurrenceProblem(f"dtstart {self.dtstart} is after the year {YEAR_MAX}")
        object.__setattr__(self, "parts", parse(self.rule))
        if self.after(self.dtstart - timedelta(microseconds=1)) is None:
            raise RecurrenceProblem(f"{self.rule!r} never occurs from {self.dtstart} on")

    def after(self, moment: datetime) -> datetime | None:
        """Return the first occurrence later than ``moment``, in UTC; None if there is none."""
        return next(self.occurrences(moment), None)

    def occurrences(self, moment: datetime) -> Iterator[datetime]:
        """Yield the occurrences later than ``moment`` in their order, in UTC."""
        start = self._local(max(moment, self.dtstart - timedelta(microseconds=1))) - GAP_MAX
        excluded = {moment.astimezone(UTC) for moment in self.exdates}
        latest = moment
        for occurrence in self._in_order(self._from(start)):
            if occurrence > latest:
                latest = occurrence
                if occurrence not in excluded:
                    yield occurrence

    def latest(self, upto: datetime, after: datetime) -> datetime | None:
        """Return the last occurrence in (``after``, ``upto``], in UTC; None if there is none.

        Looks back over growing spans, so a long pause of a frequent rule costs little.
        """
        span = timedelta(hours=1)
        while True:
            start = max(after, upto - span)
            found = list(takewhile(lambda moment: moment <= upto, self.occurrences(start)))
            if found or start == after:
                return found[-1] if found else None
            span *= 8

    def _local(self, moment: datetime) -> datetime:
        return moment.astimezone(self.zone).replace(tzinfo=None)

    def _utc(self, local: datetime) -> datetime:
        # fold=0 is the offset before a change: the first of two, and beyond the gap of none.
        return local.replace(tzinfo=self.zone, fold=0).astimezone(UTC)

    def _in_order(self, locals_: Iterator[datetime]) -> Iterator[datetime]:
        """Yield UTC moments sorted, although local times come in the order of the wall clock."""
        held: list[tuple[datetime, datetime]] = []
        for local in locals_:
            held.append((local, self._utc(local)))
            while held[-1][0] - held[0][0] > GAP_MAX:
                first = min(held, key=lambda pair: pair[1])
                held.remove(first)
                yield first[1]
        yield from sorted(moment for _, moment in held)

    def _from(self, start: datetime) -> Iterator[datetime]:
        """Yield local occurrences from about ``start`` on, within the horizon and the count."""
        origin = self._local(self.dtstart)
        count = self.parts.get("COUNT")
        begin = origin if count else max(origin, start)
        found = self._walk(origin, begin, max(begin, start) + HORIZON)
        if count:
            found = islice(found, int(count))
        until = self._until()
        return (local for local in takewhile(lambda local: local <= until, found) if local >= start)

    def _until(self) -> datetime:
        text = self.parts.get("UNTIL")
        if text is None:
            return datetime.max  # noqa: DTZ901  # local times are naive here
        until = _until(text)
        return self._local(until.replace(tzinfo=UTC)) if text.endswith("Z") else until

    def _walk(self, origin: datetime, begin: datetime, end: datetime) -> Iterator[datetime]:
        if self.parts["FREQ"] in _STEPS:
            yield from self._walk_days(origin, begin, end)
        else:
            yield from self._rule(self._moved_up(origin, begin), end)

    def _walk_days(self, origin: datetime, begin: datetime, end: datetime) -> Iterator[datetime]:
        """Find matching days first: stepping by minutes to the next leap day would take ages."""
        parts = {name: self.parts[name] for name in _DAY_PARTS if name in self.parts}
        midnight = datetime.combine(begin.date(), time.min)
        days = _dateutil({"FREQ": "DAILY"} | parts, midnight, end)
        tried = 0
        for day in days:
            rule = self._rule(
                self._moved_up(origin, max(begin, day)), day + timedelta(days=1, microseconds=-1)
            )
            tried += 1
            for local in rule:
                tried = 0
                if local >= begin:
                    yield local
            if tried > DAYS_TRIED_MAX:
                return

    def _moved_up(self, origin: datetime, begin: datetime) -> datetime:
        """Return the last step of the rule's own raster at or before ``begin``."""
        step = _MOVABLE.get(self.parts["FREQ"])
        if step is None or begin <= origin:
            return origin
        stride = step * int(self.parts.get("INTERVAL", "1"))
        return origin + (begin - origin) // stride * stride

    def _rule(self, start: datetime, end: datetime) -> Iterator[datetime]:
        parts = {name: text for name, text in self.parts.items() if name not in ("COUNT", "UNTIL")}
        return _dateutil(parts, start, end)


def parse(text: str) -> dict[str, str]:
    """Return the parts of a recurrence rule by name, upper case.

    Raises RecurrenceProblem naming the part that is wrong and what it may be.
    """
    if not isinstance(text, str) or len(text) > TEXT_SIZE_MAX:
        raise RecurrenceProblem(f"a rule is a str of at most {TEXT_SIZE_MAX} characters")
    parts: dict[str, str] = {}
    for part in text.upper().strip().removeprefix("RRULE:").split(";"):
        name, separator, value = part.strip().partition("=")
        if not (separator and value):
            raise RecurrenceProblem(f"{part!a} is not of the form NAME=VALUE")
        if name in parts:
            raise RecurrenceProblem(f"{name} is given twice")
        _check_part(name, value)
        parts[name] = value
    _check_whole(parts)
    return parts


def _check_part(name: str, value: str) -> None:
    if name in _RANGES:
        _check_numbers(name, value)
    elif name in _CHECKS:
        _CHECKS[name](name, value)
    else:
        raise RecurrenceProblem(f"{name!a} is not a part of a recurrence rule")


def _check_frequency(name: str, value: str) -> None:
    if value == "SECONDLY":
        raise RecurrenceProblem(f"{name}=SECONDLY is too frequent; MINUTELY is the limit")
    if value not in _FREQUENCIES:
        raise RecurrenceProblem(f"{name} must be one of {', '.join(_FREQUENCIES)}, not {value!a}")


def _check_amount(name: str, value: str) -> None:
    limit = INTERVAL_MAX if name == "INTERVAL" else COUNT_MAX
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= limit):
        raise RecurrenceProblem(f"{name} must be 1 to {limit}, not {value!a}")


def _check_weekdays(name: str, value: str) -> None:
    if not all(_WEEKDAY.fullmatch(day) for day in value.split(",")):
        raise RecurrenceProblem(f"{name}={value} names a weekday other than MO to SU")


def _check_until(name: str, value: str) -> None:
    if _UNTIL.fullmatch(value):
        try:
            _until(value)
        except ValueError:
            pass
        else:
            return
    raise RecurrenceProblem(f"{name} must look like 20261231 or 20261231T235959Z, not {value!a}")


def _until(text: str) -> datetime:
    """Return the naive moment of UNTIL; a mere date lasts until its end."""
    if "T" in text:
        return datetime.strptime(text[:15], "%Y%m%dT%H%M%S")  # noqa: DTZ007  # the caller's zone
    return datetime.combine(datetime.strptime(text, "%Y%m%d"), time.max)  # noqa: DTZ007


_CHECKS = {
    "FREQ": _check_frequency,
    "INTERVAL": _check_amount,
    "COUNT": _check_amount,
    "UNTIL": _check_until,
    "BYDAY": _check_weekdays,
    "WKST": _check_weekdays,
}


def _check_numbers(name: str, value: str) -> None:
    for text in value.split(","):
        if not re.fullmatch(r"[+-]?\d{1,3}", text) or int(text) not in _RANGES[name]:
            raise RecurrenceProblem(f"{name}={value} holds {text!a}, which is out of range")


def _check_whole(parts: dict[str, str]) -> None:
    if "FREQ" not in parts:
        raise RecurrenceProblem("a rule needs FREQ")
    if "COUNT" in parts and "UNTIL" in parts:
        raise RecurrenceProblem("COUNT and UNTIL exclude each other")
    is_ordinal = any(not day.isalpha() for day in parts.get("BYDAY", "MO").split(","))
    if is_ordinal and parts["FREQ"] not in ("MONTHLY", "YEARLY"):
        raise RecurrenceProblem("BYDAY takes numbers with MONTHLY and YEARLY only")
    _check_day_exists(parts)
    if parts["FREQ"] in _STEPS and not parts.keys().isdisjoint({"BYWEEKNO", "BYSETPOS"}):
        raise RecurrenceProblem("BYWEEKNO and BYSETPOS do not go with HOURLY and MINUTELY")


def _check_day_exists(parts: dict[str, str]) -> None:
    """Refuse what dateutil would look for until the end of its time: 30 February."""
    if "BYMONTH" not in parts or "BYMONTHDAY" not in parts:
        return
    lengths = [monthrange(LEAP_YEAR, int(month))[1] for month in parts["BYMONTH"].split(",")]
    if min(abs(int(day)) for day in parts["BYMONTHDAY"].split(",")) > max(lengths):
        raise RecurrenceProblem("it never occurs: none of its months has such a day")


def _dateutil(parts: dict[str, str], start: datetime, end: datetime) -> Iterator[datetime]:
    """Yield the naive moments of a rule in [``start``, ``end``].

    dateutil heeds an end only where the rule matches, and else goes on to the year 9999. The
    calendar repeats every 400 years, weekdays included, so the search is done that much
    later, where 9999 is near.
    """
    years = (MAXYEAR - HORIZON_YEARS - start.year) // 400 * 400
    text = ";".join(f"{name}={value}" for name, value in parts.items())
    try:
        rule = rrulestr(text, dtstart=start.replace(year=start.year + years))
    except ValueError as error:
        raise RecurrenceProblem(f"it never occurs: {error}") from error
    found = (local.replace(year=local.year - years) for local in rule)
    return takewhile(lambda local: local <= end, found)
