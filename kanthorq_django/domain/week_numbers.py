"""BYWEEKNO (RFC 5545): the days of numbered weeks, also of those that two years share.

dateutil's release 2.9 takes others at the turn of some years: it counts the weeks of the year
before by the days of the new one, and none from that year's end.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import groupby, product

from kanthorq_django.domain.periods import period_of, week_of
from kanthorq_django.domain.times_of_day import numbers

# What is not left to dateutil: weeks, and what is chosen of their days, as RFC 5545 has it.
OUR_PARTS = frozenset({"BYWEEKNO", "BYHOUR", "BYMINUTE", "BYSECOND", "BYSETPOS"})


def in_weeks(
    days: Iterator[datetime], parts: Mapping[str, str], origin: datetime
) -> Iterator[datetime]:
    """Yield the times on those of ``days`` that BYWEEKNO, and then BYSETPOS, choose.

    ``days`` are midnights in their order, from the beginning of a period on.
    """
    wanted, places = numbers(parts, "BYWEEKNO", ()), numbers(parts, "BYSETPOS", ())
    times = [
        timedelta(hours=hour, minutes=minute, seconds=second)
        for hour, minute, second in product(
            numbers(parts, "BYHOUR", [origin.hour]),
            numbers(parts, "BYMINUTE", [origin.minute]),
            numbers(parts, "BYSECOND", [origin.second]),
        )
    ]
    found = (day for day in days if not _numbers_of(day, parts).isdisjoint(wanted))
    for _, together in groupby(found, key=partial(period_of, parts=parts)):
        moments = [day + time for day in together for time in times]
        yield from _placed(moments, places) if places else moments


def _numbers_of(day: datetime, parts: Mapping[str, str]) -> set[int]:
    """Return the number of the week of ``day`` in its year, and that from its end, -1 the last.

    A week is of the year that has most of its days, and so its fourth.
    """
    week = week_of(day, parts)
    in_first = (week + timedelta(days=3)).replace(month=1, day=4)
    in_next_first = in_first.replace(year=in_first.year + 1)
    passed, left = week - week_of(in_first, parts), week_of(in_next_first, parts) - week
    return {passed.days // 7 + 1, -(left.days // 7)}


def _placed(moments: Sequence[datetime], places: Sequence[int]) -> list[datetime]:
    count = len(moments)
    return sorted({moments[place - (place > 0)] for place in places if abs(place) <= count})
