"""Recurrence rules (RFC 5545): when a schedule occurs, in local time, within bounded work.

A rule is evaluated in the wall-clock time of its zone, so 09:00 stays 09:00 across both
changes of the clock. A local time that a change skips moves forward by the gap (02:30
becomes 03:30), one that occurs twice is taken the first time, or the second if the rule
starts then; nothing occurs before the start, and COUNT counts the moments that come of all
this. Every search ends: frequencies and counts are limited, the rule is moved up before
searching, and a horizon bounds what may lie ahead.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import MAXYEAR, UTC, datetime, time, timedelta
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from dateutil.rrule import rrulestr

from kanthorq_django.domain.periods import WEEKDAYS, period_of
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.rules import (
    DAY_PARTS,
    WITHIN_DAYS,
    RecurrenceProblem,
    parse,
    until_moment,
    weeks_max,
)
from kanthorq_django.domain.times_of_day import TimesOfDay
from kanthorq_django.domain.week_numbers import OUR_PARTS, in_weeks

# After so many years all days are on the same weekdays again.
CALENDAR_YEARS = 400
SEARCH_END = datetime(MAXYEAR - 1, 12, 31)  # noqa: DTZ001  # local; zones need a day beyond
YEAR_MIN, YEAR_MAX = 1900, 3000
CHANGE_MAX = timedelta(days=1)  # of a clock: where the date line moves, a whole day is skipped
DAYS_TRIED_MAX = 1_500  # matching days without a matching time, in one search

_STRIDES = {
    "WEEKLY": timedelta(weeks=1),
    "DAILY": timedelta(days=1),
}
_MONTHS = {"MONTHLY": 1, "YEARLY": 12}
# With any of these a rule does not take its day from its start.
_DAY_CHOICES = ("BYMONTHDAY", "BYYEARDAY", "BYDAY")


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
    origin: datetime = field(init=False, compare=False)  # dtstart as the clocks show it

    def __post_init__(self) -> None:
        if not YEAR_MIN <= self.dtstart.year <= YEAR_MAX:
            raise RecurrenceProblem(
                f"dtstart {self.dtstart} is not in the years {YEAR_MIN} to {YEAR_MAX}",
                about="dtstart",
            )
        # A rule goes by whole seconds: with more, its first occurrence would lie before it.
        start = self.dtstart.replace(microsecond=0).astimezone(UTC)
        object.__setattr__(self, "dtstart", start)
        object.__setattr__(self, "parts", parse(self.rule))
        object.__setattr__(self, "origin", self._local(self.dtstart))
        if self.after(self._before) is None:
            raise RecurrenceProblem(f"{quoted(self.rule)} never occurs from {self.dtstart} on")

    def after(self, moment: datetime) -> datetime | None:
        """Return the first occurrence later than ``moment``, in UTC; None if there is none."""
        return next(self.occurrences(moment), None)

    def occurrences(self, moment: datetime) -> Iterator[datetime]:
        """Yield the occurrences later than ``moment`` in their order, in UTC."""
        excluded = {moment.astimezone(UTC) for moment in self.exdates}
        for occurrence in self._from(max(moment, self._before)):
            if occurrence > moment and occurrence not in excluded:
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

    @property
    def _before(self) -> datetime:
        return self.dtstart - timedelta(microseconds=1)

    def _local(self, moment: datetime) -> datetime:
        return moment.astimezone(self.zone).replace(tzinfo=None)

    def _utc(self, local: datetime) -> datetime:
        # fold=0 is the offset before a change: the first of two, and beyond the gap of none.
        fold = self.origin.fold if local == self.origin else 0
        return local.replace(tzinfo=self.zone, fold=fold).astimezone(UTC)

    def _from(self, moment: datetime) -> Iterator[datetime]:
        """Yield the moments of the rule in their order, from some before ``moment`` on."""
        count, until = self.parts.get("COUNT"), self._until_utc()
        found = _rising(self._in_order(self._locals(moment)), self._before)
        if until is not None:
            found = takewhile(lambda moment: moment <= until, found)
        return islice(found, int(count)) if count else found

    def _in_order(self, locals_: Iterator[datetime]) -> Iterator[datetime]:
        """Yield UTC moments sorted, although local times come in the order of the wall clock.

        A local time that a change of the clock skips is moved forward, so it may come later than
        local times behind it. These are no earlier than the change.
        """
        skipped: deque[datetime] = deque()
        for local in locals_:
            moment = self._utc(local)
            is_skipped = self._local(moment) != local
            earliest_left = moment - CHANGE_MAX if is_skipped else moment
            while skipped and skipped[0] <= earliest_left:
                yield skipped.popleft()
            if is_skipped:
                skipped.append(moment)
            else:
                yield moment
        yield from skipped

    def _locals(self, moment: datetime) -> Iterator[datetime]:
        """Yield local times from before ``moment`` on, or from the first if they are counted."""
        (start, _), until = self._shown(moment), self._until()
        # Clocks that are set back show a time twice. If the rule starts at the second one, they
        # show later times before it starts.
        is_whole = "COUNT" in self.parts or moment < self.dtstart
        begin = self.origin if is_whole else max(self.origin, start)
        found = self._walk(begin, self._end_of_search(max(begin, start)))
        return (local for local in takewhile(lambda local: local <= until, found) if local >= begin)

    def _end_of_search(self, start: datetime) -> datetime:
        """Return when the steps of the rule have met each day of the calendar that they ever meet.

        In years that is a few hundred steps, in days 146,097.
        """
        years = CALENDAR_YEARS * int(self.parts.get("INTERVAL", "1"))
        if start.year + years > SEARCH_END.year:
            return SEARCH_END
        return start.replace(year=start.year + years)

    def _until(self) -> datetime:
        """Return a local time that no occurrence is later than."""
        text = self.parts.get("UNTIL")
        if text is None:
            return datetime.max  # noqa: DTZ901  # local times are naive here
        until = self._until_utc()
        return until_moment(text) if until is None else self._shown(until)[1]

    def _shown(self, moment: datetime) -> tuple[datetime, datetime]:
        """Return ``moment`` by the offset of then and by that of a day before, the earlier first.

        They differ for a day after a change of the clock. What it skipped may be yet to come
        although the clock shows a later time; what it repeated has been although the clock shows
        an earlier one.
        """
        day_before = moment.astimezone(UTC) - CHANGE_MAX  # by real hours, not by those of a clock
        first, last = sorted([self._local(moment), self._local(day_before) + CHANGE_MAX])
        return first, last

    def _until_utc(self) -> datetime | None:
        """Return the moment that UNTIL ends with; None if it is a local time."""
        text = self.parts.get("UNTIL", "")
        if not text.endswith("Z"):
            return None
        until = until_moment(text)
        # People write the year 9999 for ever, where no zone can be looked up.
        return until.replace(tzinfo=UTC) if YEAR_MIN <= until.year <= YEAR_MAX else None

    def _walk(self, begin: datetime, end: datetime) -> Iterator[datetime]:
        if self.parts["FREQ"] in WITHIN_DAYS:
            yield from self._walk_days(begin, end)
        else:
            yield from self._rule(self._moved_up(begin), end)

    def _walk_days(self, begin: datetime, end: datetime) -> Iterator[datetime]:
        """Find matching days first: stepping by minutes to the next leap day would take ages."""
        parts = {name: self.parts[name] for name in DAY_PARTS if name in self.parts}
        if parts.keys().isdisjoint(_DAY_CHOICES):
            parts["BYDAY"] = ",".join(WEEKDAYS)
        midnight = datetime.combine(begin.date(), time.min)
        times = TimesOfDay.of(self.parts, self.origin)
        tried = 0
        # The days are those of DAILY, which needs as long for a month as YEARLY for a year.
        for day in _dateutil({"FREQ": "YEARLY"} | parts, midnight, end):
            tried += 1
            for local in times.on(day):
                if local >= begin:
                    tried = 0
                    yield local
            if tried > DAYS_TRIED_MAX:
                return

    def _moved_up(self, begin: datetime) -> datetime:
        """Return a step of the rule's own raster before ``begin``, or the origin.

        Not the last one: a first day that is cut by the start of a search misses its early hours.
        """
        origin, interval = self.origin, int(self.parts.get("INTERVAL", "1"))
        if months := _MONTHS.get(self.parts["FREQ"]):
            passed = (begin.year - origin.year) * 12 + begin.month - origin.month
            steps = passed // (months * interval) - 1
            return _later(origin, steps * months * interval) if steps > 0 else origin
        stride = _STRIDES[self.parts["FREQ"]] * interval
        return origin + max(0, (begin - origin) // stride - 1) * stride

    def _rule(self, start: datetime, end: datetime) -> Iterator[datetime]:
        parts = {name: text for name, text in self.parts.items() if name not in ("COUNT", "UNTIL")}
        parts = self._implied() | parts
        parts |= _numbered_weekdays(parts)
        # From its beginning: of a part of it, BYSETPOS would count the days that are left.
        period = period_of(start, parts)
        if "BYWEEKNO" not in parts:
            return _dateutil(parts, period, end)
        days = {name: text for name, text in parts.items() if name not in OUR_PARTS}
        midnight = datetime.combine(period, time.min)
        return in_weeks(_dateutil(days, midnight, end), parts, self.origin)

    def _implied(self) -> dict[str, str]:
        """Return what a rule takes from its start: moving up changes it, or dateutil lacks it."""
        frequency = self.parts["FREQ"]
        if frequency == "DAILY" or not self.parts.keys().isdisjoint(_DAY_CHOICES):
            return {}
        if frequency == "WEEKLY" or "BYWEEKNO" in self.parts:
            return {"BYDAY": WEEKDAYS[self.origin.weekday()]}
        implied = {"BYMONTHDAY": str(self.origin.day)}
        return implied | ({"BYMONTH": str(self.origin.month)} if frequency == "YEARLY" else {})


def _numbered_weekdays(parts: Mapping[str, str]) -> dict[str, str]:
    """Return BYDAY with numbers for all of its weekdays, if some have one.

    It is the union of its weekdays; dateutil takes what is both among those with a number and
    among those without.
    """
    days = parts.get("BYDAY", "").split(",")
    plain = [day for day in days if day.isalpha()]
    if len(plain) in (0, len(days)):
        return {}
    all_numbers = range(1, weeks_max(parts) + 1)
    numbered = [f"{number}{day}" for day in plain for number in all_numbers]
    return {"BYDAY": ",".join([*numbered, *(day for day in days if not day.isalpha())])}


def _rising(moments: Iterator[datetime], latest: datetime) -> Iterator[datetime]:
    """Yield what is later than ``latest`` and all before: two local times can be one moment."""
    for moment in moments:
        if moment > latest:
            latest = moment
            yield moment


def _later(origin: datetime, months: int) -> datetime:
    """Return the first day of the month that is so many months later."""
    year, month = divmod(origin.year * 12 + origin.month - 1 + months, 12)
    return origin.replace(year=year, month=month + 1, day=1)


def _dateutil(parts: dict[str, str], start: datetime, end: datetime) -> Iterator[datetime]:
    """Yield the naive moments of a rule in [``start``, ``end``].

    dateutil looks at an end only when it has found a match, and without one searches up to the
    year 9999. So the search is moved on by whole calendars, to where that year is near, and what
    it finds is moved back.
    """
    years = (MAXYEAR - end.year) // CALENDAR_YEARS * CALENDAR_YEARS
    text = ";".join(f"{name}={value}" for name, value in parts.items())
    try:
        rule = rrulestr(text, dtstart=start.replace(year=start.year + years))
    except ValueError as error:
        raise RecurrenceProblem(f"it never occurs: {error}") from error
    found = (local.replace(year=local.year - years) for local in rule)
    return takewhile(lambda local: local <= end, found)
