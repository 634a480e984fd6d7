import contextlib
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from dateutil.rrule import rrulestr
from hypothesis import given, settings
from hypothesis import strategies as st

from kanthorq_django.domain.recurrence import Recurrence, RecurrenceProblem

BERLIN = ZoneInfo("Europe/Berlin")
UTC_ZONE = ZoneInfo("UTC")
START = datetime(2026, 11, 20, 12, tzinfo=UTC)


def local(recurrence: Recurrence, after: datetime, count: int) -> list[str]:
    found = islice(recurrence.occurrences(after), count)
    return [f"{moment.astimezone(recurrence.zone):%m-%d %H:%M %z}" for moment in found]


def test_local_time_stays_local_across_both_changes_of_the_clock():
    start = datetime(2026, 3, 28, 9, tzinfo=BERLIN)
    daily = Recurrence("FREQ=DAILY", start, BERLIN)
    assert local(daily, start, 2) == ["03-29 09:00 +0200", "03-30 09:00 +0200"]
    autumn = datetime(2026, 10, 24, 9, tzinfo=BERLIN)
    assert local(daily, autumn, 2) == ["10-25 09:00 +0100", "10-26 09:00 +0100"]


def test_a_time_that_the_clock_skips_moves_forward_by_the_gap():
    start = datetime(2026, 3, 28, 2, 30, tzinfo=BERLIN)
    daily = Recurrence("FREQ=DAILY", start, BERLIN)
    assert local(daily, start, 2) == ["03-29 03:30 +0200", "03-30 02:30 +0200"]


def test_a_time_that_occurs_twice_is_taken_the_first_time():
    start = datetime(2026, 10, 24, 2, 30, tzinfo=BERLIN)
    daily = Recurrence("FREQ=DAILY", start, BERLIN)
    assert local(daily, start, 2) == ["10-25 02:30 +0200", "10-26 02:30 +0100"]


def test_hours_around_a_gap_come_in_order_and_once():
    start = datetime(2026, 3, 29, 0, tzinfo=BERLIN)
    hourly = Recurrence("FREQ=HOURLY", start, BERLIN)
    moments = list(islice(hourly.occurrences(start), 6))
    assert moments == sorted(set(moments))


def test_exdates_are_left_out_but_counted():
    left_out = frozenset({START + timedelta(days=1)})
    rule = Recurrence("FREQ=DAILY;COUNT=3", START, UTC_ZONE, left_out)
    assert list(rule.occurrences(START - timedelta(days=9))) == [START, START + timedelta(days=2)]


@pytest.mark.parametrize(
    ("until", "last"),
    [
        ("20261122", datetime(2026, 11, 22, 12, tzinfo=UTC)),
        ("20261122T120000Z", datetime(2026, 11, 22, 12, tzinfo=UTC)),
        ("20261122T115959Z", datetime(2026, 11, 21, 12, tzinfo=UTC)),
        ("20261122T130000", datetime(2026, 11, 22, 12, tzinfo=UTC)),  # in the rule's zone
    ],
)
def test_until_ends_a_rule_inclusively(until: str, last: datetime):
    rule = Recurrence(f"FREQ=DAILY;UNTIL={until}", START, BERLIN)
    assert list(rule.occurrences(START))[-1] == last


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ("", "NAME=VALUE"),
        ("FREQ", "NAME=VALUE"),
        ("INTERVAL=2", "needs FREQ"),
        ("FREQ=SOMETIMES", "SOMETIMES"),
        ("FREQ=SECONDLY", "too frequent"),
        ("FREQ=DAILY;INTERVAL=0", "INTERVAL"),
        ("FREQ=DAILY;INTERVAL=-1", "INTERVAL"),
        ("FREQ=DAILY;INTERVAL=99999999999999999999", "INTERVAL"),
        ("FREQ=DAILY;COUNT=10001", "COUNT"),
        ("FREQ=DAILY;COUNT=2;UNTIL=20270101", "exclude"),
        ("FREQ=DAILY;UNTIL=tomorrow", "UNTIL"),
        ("FREQ=DAILY;UNTIL=20261399", "UNTIL"),
        ("FREQ=DAILY;UNTIL=20200101", "never occurs"),
        ("FREQ=DAILY;BYHOUR=25", "BYHOUR"),
        ("FREQ=DAILY;BYHOUR=", "NAME=VALUE"),
        ("FREQ=DAILY;BYDAY=XX", "weekday"),
        ("FREQ=DAILY;BYDAY=1MO", "MONTHLY and YEARLY"),
        ("FREQ=DAILY;FREQ=DAILY", "twice"),
        ("FREQ=DAILY;BYEASTER=1", "BYEASTER"),
        ("FREQ=DAILY\nDTSTART:20200101T000000", "FREQ"),
        ("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30", "never occurs"),
        ("FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30", "never occurs"),
        ("FREQ=MINUTELY;BYMONTH=2,4;BYMONTHDAY=31", "never occurs"),
        ("FREQ=DAILY;BYMONTH=3;BYYEARDAY=366", "never occurs"),
        ("FREQ=DAILY;INTERVAL=7;BYDAY=SA", "never occurs"),
        ("FREQ=HOURLY;INTERVAL=24;BYHOUR=3", "never occurs"),
        ("FREQ=MINUTELY;INTERVAL=60;BYMINUTE=7", "never occurs"),
        ("FREQ=YEARLY;BYWEEKNO=53;BYMONTH=6", "never occurs"),
        ("FREQ=DAILY;" + "BYDAY=MO;" * 100, "characters"),
    ],
)
def test_a_rule_that_is_wrong_or_never_occurs_is_refused(rule: str, word: str):
    with pytest.raises(RecurrenceProblem, match=word):
        Recurrence(rule, START, UTC_ZONE)


@pytest.mark.parametrize(
    "rule", ["FREQ=MINUTELY", "FREQ=HOURLY;BYHOUR=9", "FREQ=DAILY", "FREQ=MINUTELY;INTERVAL=7"]
)
def test_an_old_start_does_not_make_a_search_long(rule: str, monkeypatch: pytest.MonkeyPatch):
    steps = itertools.count()

    def counted(*args: Any, **kwargs: Any) -> Iterator[datetime]:
        for moment in rrulestr(*args, **kwargs):
            next(steps)
            yield moment

    monkeypatch.setattr("kanthorq_django.domain.recurrence.rrulestr", counted)
    recurrence = Recurrence(rule, datetime(1926, 1, 1, tzinfo=UTC), UTC_ZONE)
    assert recurrence.after(START) is not None
    assert recurrence.latest(START, START - timedelta(days=3650)) is not None
    assert next(steps) < 5_000  # a century has 52,594,560 minutes


def test_latest_is_the_last_one_within_its_bounds():
    rule = Recurrence("FREQ=WEEKLY;BYDAY=MO", START, UTC_ZONE)
    monday = datetime(2026, 12, 14, 12, tzinfo=UTC)
    assert rule.latest(monday, START) == monday
    assert rule.latest(monday - timedelta(seconds=1), START) == monday - timedelta(days=7)
    assert rule.latest(monday, monday) is None


def test_the_rarest_rule_is_found_within_the_horizon():
    rule = Recurrence("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=29;BYDAY=MO", START, UTC_ZONE)
    assert rule.after(START) == datetime(2044, 2, 29, 12, tzinfo=UTC)


RULES = st.builds(
    lambda freq, parts: ";".join([f"FREQ={freq}", *(part for part in parts if part)]),
    st.sampled_from(["YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY"]),
    st.tuples(
        st.sampled_from(["", "INTERVAL=2", "INTERVAL=3", "INTERVAL=9"]),
        st.sampled_from(["", "BYDAY=MO", "BYDAY=TU,SU"]),
        st.sampled_from(["", "BYMONTH=2", "BYMONTH=1,12"]),
        st.sampled_from(["", "BYMONTHDAY=1", "BYMONTHDAY=-1", "BYMONTHDAY=28,31"]),
        st.sampled_from(["", "BYHOUR=3", "BYHOUR=0,23"]),
        st.sampled_from(["", "COUNT=1", "COUNT=30"]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    rule=RULES,
    start=st.datetimes(datetime(2025, 1, 1), datetime(2026, 12, 28), timezones=st.just(UTC)),  # noqa: DTZ001
    pause=st.timedeltas(timedelta(days=-1), timedelta(days=400)),
)
def test_in_utc_it_agrees_with_dateutil(rule: str, start: datetime, pause: timedelta):
    start = start.replace(microsecond=0)
    moment = start + pause
    assert ours(rule, start, moment) == dateutils_own(rule, start, moment)


def ours(rule: str, start: datetime, moment: datetime) -> list[datetime]:
    with contextlib.suppress(RecurrenceProblem):  # it never occurs; then dateutil finds nothing
        return list(islice(Recurrence(rule, start, UTC_ZONE).occurrences(moment), 4))
    return []


def dateutils_own(rule: str, start: datetime, moment: datetime) -> list[datetime]:
    found: list[datetime] = []
    try:
        for occurrence in rrulestr(rule, dtstart=start):
            if len(found) == 4 or occurrence > moment + timedelta(days=41 * 366):
                break
            if occurrence > moment:
                found.append(occurrence)
    except ValueError:  # it can tell by itself that some rules never occur
        return []
    return found
