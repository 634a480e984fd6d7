import contextlib
import itertools
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from dateutil.rrule import rrulestr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kanthorq_django.domain.recurrence import Recurrence
from kanthorq_django.domain.rules import RecurrenceProblem

BERLIN = ZoneInfo("Europe/Berlin")
UTC_ZONE = ZoneInfo("UTC")
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
AGES_AGO = datetime(1900, 1, 1, tzinfo=UTC)
# Two days before the clocks change, at a time that then is skipped, or comes twice.
SPRING = datetime(2027, 3, 26, 2, 30, tzinfo=BERLIN)
AUTUMN = datetime(2027, 10, 29, 2, 30, tzinfo=BERLIN)


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


@pytest.mark.parametrize(
    ("rule", "occurrences"),
    [
        ("FREQ=DAILY", ["10-31 02:30 +0100", "11-01 02:30 +0100"]),
        ("FREQ=DAILY;COUNT=1", ["10-31 02:30 +0100"]),
        ("FREQ=HOURLY;COUNT=2", ["10-31 02:30 +0100", "10-31 03:30 +0100"]),
        # 02:40 occurs the first time, which is before the start.
        ("FREQ=MINUTELY;INTERVAL=10", ["10-31 02:30 +0100", "10-31 03:00 +0100"]),
        ("FREQ=DAILY;BYMINUTE=40", ["11-01 02:40 +0100", "11-02 02:40 +0100"]),
    ],
)
def test_a_start_at_the_second_of_two_times_occurs_and_nothing_does_before(
    rule: str, occurrences: list[str]
):
    start = datetime(2027, 10, 31, 2, 30, fold=1, tzinfo=BERLIN)
    assert local(Recurrence(rule, start, BERLIN), START, 2) == occurrences


def test_a_start_at_the_moment_of_the_change_occurs():
    start = datetime(2027, 10, 31, 2, fold=1, tzinfo=BERLIN)
    daily = Recurrence("FREQ=DAILY", start, BERLIN)
    assert local(daily, START, 2) == ["10-31 02:00 +0100", "11-01 02:00 +0100"]


def test_hours_around_a_gap_come_in_order_and_once():
    start = datetime(2026, 3, 29, 0, tzinfo=BERLIN)
    hourly = Recurrence("FREQ=HOURLY", start, BERLIN)
    moments = list(islice(hourly.occurrences(start), 6))
    assert moments == sorted(set(moments))


def test_a_frequent_rule_pauses_while_an_hour_is_repeated_but_not_in_utc():
    start = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # 02:30 in Berlin, for the first time
    half_hourly = Recurrence("FREQ=MINUTELY;INTERVAL=30", start, BERLIN)
    assert local(half_hourly, start - DAY, 3) == [
        "10-25 02:30 +0200",
        "10-25 03:00 +0100",
        "10-25 03:30 +0100",
    ]
    in_utc = Recurrence("FREQ=MINUTELY;INTERVAL=30", start, UTC_ZONE)
    assert in_utc.after(start) == start + timedelta(minutes=30)


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
    ("start", "until", "last"),
    [
        # The clocks show 02:30 for the first time, at 00:30Z; UNTIL is 02:00 the second time.
        (AUTUMN, "20271031T010000Z", "10-31 00:30"),
        (AUTUMN, "20271031T003000Z", "10-31 00:30"),
        (AUTUMN, "20271031T002959Z", "10-30 00:30"),
        # 02:30 moves to 03:30, which is 01:30Z; UNTIL is 03:15.
        (SPRING, "20270328T011500Z", "03-27 01:30"),
        (SPRING, "20270328T013000Z", "03-28 01:30"),
    ],
)
def test_until_in_utc_is_a_moment_also_when_the_clocks_change(
    start: datetime, until: str, last: str
):
    rule = Recurrence(f"FREQ=DAILY;UNTIL={until}", start, BERLIN)
    assert f"{list(rule.occurrences(start))[-1]:%m-%d %H:%M}" == last


def test_until_in_local_time_is_what_the_clocks_show():
    for until, days in [("20271031T023000", 3), ("20271031T022959", 2)]:
        rule = Recurrence(f"FREQ=DAILY;UNTIL={until}", AUTUMN, BERLIN)
        assert len(list(rule.occurrences(AUTUMN - DAY))) == days


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
        ("FREQ=HOURLY;INTERVAL=168;BYDAY=SA", "never occurs"),  # from a Friday on
        ("FREQ=MINUTELY;INTERVAL=2;BYMINUTE=1,3,5,7,9,11,13,15,17,19,21,23,25", "never occurs"),
        ("FREQ=HOURLY;BYWEEKNO=3", "do not go with HOURLY"),
        ("FREQ=YEARLY;INTERVAL=41", "INTERVAL must be 1 to 40"),
        ("FREQ=MONTHLY;INTERVAL=481", "INTERVAL must be 1 to 480"),
        ("FREQ=YEARLY;BYDAY=54MO", "numbers weekdays 1 to 53"),
        ("FREQ=YEARLY;BYMONTH=12;BYDAY=6MO", "numbers weekdays 1 to 5"),
        ("FREQ=MONTHLY;BYDAY=0MO", "numbers weekdays 1 to 5"),
        ("FREQ=WEEKLY;WKST=MO,TU", "WKST must be one weekday"),
        ("FREQ=DAILY;BYHOUR=\u0663", "BYHOUR"),
        ("FREQ=MINUTELY;BYSECOND=0,30", "BYSECOND takes one number"),
        ("FREQ=DAILY;BYHOUR=1,2;BYMINUTE=" + ",".join(map(str, range(60))), "120 times a day"),
        ("FREQ=DAILY;BYSETPOS=2", "BYSETPOS must be at most 1"),
        ("FREQ=WEEKLY;BYDAY=MO;BYSETPOS=8", "BYSETPOS must be at most 7"),
        ("FREQ=DAILY;UNTIL=00010101T000000Z", "never occurs"),
    ],
)
def test_a_rule_that_is_wrong_or_never_occurs_is_refused(rule: str, word: str):
    with pytest.raises(RecurrenceProblem, match=word):
        Recurrence(rule, START, UTC_ZONE)


@pytest.mark.parametrize("rule", ["0 3 * * *", "*/5 9-17 * * MON-FRI", " 0 0 1,15 * ?", "@daily"])
def test_cron_is_recognised_and_told_how_it_is_said_here(rule: str):
    with pytest.raises(RecurrenceProblem, match=r"is of cron; .*FREQ=DAILY;BYHOUR=3;BYMINUTE=0"):
        Recurrence(rule, START, UTC_ZONE)


@pytest.mark.parametrize(
    ("rule", "part"),
    [("every Monday", "every Monday"), ("rrule:x", "x"), ("1 a day from now", "1 a day from now")],
)
def test_what_is_no_part_is_shown_as_it_was_given(rule: str, part: str):
    told = f"the part '{part}' of the rrule is not of the form NAME=VALUE, such as FREQ=WEEKLY"
    with pytest.raises(RecurrenceProblem, match=f"^{told}$"):
        Recurrence(rule, START, UTC_ZONE)


def test_a_rule_may_be_written_in_small_letters():
    rule = Recurrence("rrule:freq=weekly; byday=mo", START, UTC_ZONE)
    assert rule.parts == {"FREQ": "WEEKLY", "BYDAY": "MO"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """What is next tells how many moments were searched."""
    steps = itertools.count()

    def counted(*args: Any, **kwargs: Any) -> Iterator[datetime]:
        for moment in rrulestr(*args, **kwargs):
            next(steps)
            yield moment

    monkeypatch.setattr("kanthorq_django.domain.recurrence.rrulestr", counted)
    return steps


def test_a_rule_whose_every_time_is_skipped_is_searched_no_longer_than_others(steps: Iterator[int]):
    rule = "FREQ=YEARLY;BYMONTH=3;BYDAY=-1SU;BYHOUR=2;BYMINUTE=30"
    skipped = Recurrence(rule, START, BERLIN)
    assert local(skipped, START, 2) == ["03-28 03:30 +0200", "03-26 03:30 +0200"]
    assert next(steps) < 20


@pytest.mark.parametrize(
    "rule",
    [
        "FREQ=MINUTELY",
        "FREQ=HOURLY;BYHOUR=9",
        "FREQ=DAILY",
        "FREQ=MINUTELY;INTERVAL=7",
        "FREQ=WEEKLY;INTERVAL=2",
        "FREQ=MONTHLY",
        "FREQ=YEARLY",
        "FREQ=YEARLY;BYHOUR=1,2,3;BYMINUTE=0,30",
    ],
)
def test_an_old_start_does_not_make_a_search_long(rule: str, steps: Iterator[int]):
    recurrence = Recurrence(rule, datetime(1926, 1, 1, tzinfo=UTC), UTC_ZONE)
    assert recurrence.after(START) is not None
    assert recurrence.latest(START, START - timedelta(days=3650)) is not None
    assert next(steps) < 5_000  # a century has 52,594,560 minutes


@pytest.mark.parametrize(
    "rule",
    ["FREQ=MONTHLY;INTERVAL=5", "FREQ=YEARLY", "FREQ=YEARLY;INTERVAL=3;BYMONTH=6", "FREQ=MONTHLY"],
)
@pytest.mark.parametrize("day", [5, 30])
def test_a_rule_by_months_keeps_its_day_however_old_it_is(rule: str, day: int):
    start = datetime(1926, 1, day, 9, tzinfo=UTC)
    assert ours(rule, start, START) == dateutils_own(rule, start, START)


@pytest.mark.parametrize("frequency", ["YEARLY", "MONTHLY", "WEEKLY"])
def test_the_weekday_of_a_numbered_week_is_that_of_the_start(frequency: str):
    start = datetime(2027, 5, 19, 9, tzinfo=UTC)  # a Wednesday, in week 20
    rule = Recurrence(f"FREQ={frequency};BYWEEKNO=20", start, UTC_ZONE)
    assert local(rule, start - DAY, 3) == [
        "05-19 09:00 +0000",
        "05-17 09:00 +0000",
        "05-16 09:00 +0000",
    ]


@pytest.mark.parametrize(
    ("rule", "days"),
    [
        ("FREQ=YEARLY;BYWEEKNO=20;BYDAY=MO,TU", [15, 16, 14]),
        ("FREQ=DAILY;BYWEEKNO=20", [20, 21, 22]),
    ],
)
def test_a_numbered_week_has_the_days_that_a_rule_names(rule: str, days: list[int]):
    start = datetime(2027, 5, 19, 9, tzinfo=UTC)
    found = islice(Recurrence(rule, start, UTC_ZONE).occurrences(start), 3)
    assert [moment.day for moment in found] == days


def test_each_occurrence_of_a_counted_rule_is_counted_once():
    start = datetime(2026, 11, 20, 3, tzinfo=UTC)
    rule = Recurrence("FREQ=HOURLY;INTERVAL=9;COUNT=10", start, UTC_ZONE)
    hours = [start + number * timedelta(hours=9) for number in range(10)]
    assert list(rule.occurrences(start - timedelta(seconds=1))) == hours


@pytest.mark.parametrize(
    ("rule", "hours"),
    [
        ("FREQ=HOURLY;COUNT=5", [0, 1, 3, 4, 5]),
        ("FREQ=DAILY;BYHOUR=1,2,3,4;COUNT=3", [1, 3, 4]),
        ("FREQ=HOURLY;BYMINUTE=0;BYHOUR=2,3;COUNT=1", [3]),
    ],
)
def test_local_times_that_a_change_makes_one_moment_are_counted_once(rule: str, hours: list[int]):
    start = datetime(2027, 3, 28, 0, tzinfo=BERLIN)
    counted = Recurrence(rule, start, BERLIN)
    expected = [datetime(2027, 3, 28, hour, tzinfo=BERLIN) for hour in hours]
    assert list(counted.occurrences(start - DAY)) == expected
    later = [moment for moment in expected if moment > expected[0]]
    assert list(counted.occurrences(expected[0])) == later


def test_what_is_before_the_start_is_not_counted():
    start = datetime(2027, 10, 31, 2, 30, fold=1, tzinfo=BERLIN)
    rule = Recurrence("FREQ=MINUTELY;INTERVAL=10;COUNT=3", start, BERLIN)
    assert local(rule, START, 4) == ["10-31 02:30 +0100", "10-31 03:00 +0100", "10-31 03:10 +0100"]


def test_a_zone_that_skips_a_day_has_each_moment_once():
    apia = ZoneInfo("Pacific/Apia")  # it had no 30 December 2011
    start = datetime(2011, 12, 29, 20, tzinfo=apia).astimezone(UTC)
    hourly = Recurrence("FREQ=HOURLY;COUNT=40", start, apia)
    moments = list(hourly.occurrences(start - DAY))
    assert moments == [start + number * timedelta(hours=1) for number in range(40)]


CLOCK_CHANGES = [
    ("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC)),
    ("Pacific/Kwajalein", datetime(1993, 8, 21, 12, tzinfo=UTC)),
    ("Pacific/Kiritimati", datetime(1994, 12, 31, 10, tzinfo=UTC)),
    ("Pacific/Kwajalein", datetime(1969, 9, 30, 13, tzinfo=UTC)),  # 23 hours back
    ("Antarctica/McMurdo", datetime(1956, 1, 1, tzinfo=UTC)),  # 12 hours forward
    ("Europe/Berlin", datetime(2027, 3, 28, 1, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2027, 10, 31, 1, tzinfo=UTC)),
]


@pytest.mark.parametrize(("name", "changed_at"), CLOCK_CHANGES)
@pytest.mark.parametrize(
    "rule",
    [
        "FREQ=WEEKLY;BYDAY=TU,FR,SA;BYHOUR=9",
        "FREQ=DAILY;BYHOUR=1,2,22",
        "FREQ=HOURLY;INTERVAL=7",
        "FREQ=MINUTELY;INTERVAL=50",
        "FREQ=HOURLY;COUNT=99",
    ],
)
def test_the_next_and_the_last_one_are_among_all_also_where_a_day_is_skipped(
    rule: str, name: str, changed_at: datetime
):
    recurrence = Recurrence(rule, changed_at - 3 * DAY, ZoneInfo(name))
    moments = list(islice(recurrence.occurrences(AGES_AGO), 300))
    assert moments == sorted(set(moments))
    for hours in range(-30, 51):
        moment = changed_at + timedelta(hours=hours, minutes=10)
        passed, coming = [m for m in moments if m <= moment], [m for m in moments if m > moment]
        assert recurrence.after(moment) == (coming[0] if coming else None)
        assert recurrence.latest(moment, AGES_AGO) == (passed[-1] if passed else None)


def test_what_is_on_a_day_that_is_skipped_comes_a_day_later_among_what_is_there():
    apia = ZoneInfo("Pacific/Apia")
    start = datetime(2011, 12, 29, 6, tzinfo=apia)
    moments = Recurrence("FREQ=HOURLY;INTERVAL=7", start, apia).occurrences(AGES_AGO)
    assert [f"{moment.astimezone(apia):%d %H}" for moment in islice(moments, 11)] == [
        "29 06", "29 13", "29 20", "31 00", "31 03", "31 07", "31 10", "31 14", "31 17", "31 21",
        "01 04",
    ]  # fmt: skip
    friday = Recurrence("FREQ=WEEKLY;BYDAY=FR;BYHOUR=9;BYMINUTE=0", start, apia)
    morning = datetime(2011, 12, 31, 4, tzinfo=apia)
    assert local(friday, morning, 2) == ["12-31 09:00 +1400", "01-06 09:00 +1400"]


def test_until_in_utc_is_a_moment_also_when_a_day_is_repeated():
    kwajalein = ZoneInfo("Pacific/Kwajalein")  # after 1 October 1969, 00:00, it was 01:00 again
    start = datetime(1969, 9, 28, 20, tzinfo=kwajalein)
    until = datetime(1969, 9, 30, 2, fold=1, tzinfo=kwajalein).astimezone(UTC)
    daily = Recurrence(f"FREQ=DAILY;UNTIL={until:%Y%m%dT%H%M%SZ}", start, kwajalein)
    assert [moment.day for moment in daily.occurrences(AGES_AGO)] == [28, 29, 30]


def test_a_place_in_the_week_is_counted_from_its_beginning():
    start = datetime(2026, 11, 18, 9, tzinfo=UTC)  # a Wednesday
    rule = Recurrence("FREQ=WEEKLY;BYDAY=MO,FR;BYSETPOS=1", start, UTC_ZONE)
    assert rule.after(datetime(2026, 12, 16, 10, tzinfo=UTC)) == datetime(
        2026, 12, 21, 9, tzinfo=UTC
    )


@pytest.mark.parametrize(
    ("rule", "days"),
    [
        ("FREQ=MONTHLY;BYDAY=WE,2TU", [2, 8, 9, 16, 23, 30]),
        ("FREQ=MONTHLY;BYDAY=FR,-1FR", [4, 11, 18, 25]),
        ("FREQ=YEARLY;BYMONTH=6;BYDAY=2TU,WE;BYSETPOS=-1,2", [8, 30]),
        ("FREQ=YEARLY;BYDAY=TU,23WE", [1, 8, 9, 15, 22, 29]),
    ],
)
def test_weekdays_with_and_without_numbers_are_all_meant(rule: str, days: list[int]):
    start = datetime(2027, 6, 1, 9, tzinfo=UTC)  # a Tuesday
    found = islice(Recurrence(rule, start, UTC_ZONE).occurrences(start - DAY), len(days))
    assert [moment.day for moment in found] == days


def iso_weeks(number: int, weekday: int, years: range) -> list[date]:
    """Return the weekday of the week with that number in each year that has one."""
    numbers = ((year, date(year, 12, 28).isocalendar().week) for year in years)
    return [date.fromisocalendar(year, number, weekday) for year, last in numbers if number <= last]


@pytest.mark.parametrize("number", [1, 52, 53])
@pytest.mark.parametrize("weekday", [1, 4, 7])
def test_weeks_that_two_years_share_have_the_number_that_iso_8601_gives(number: int, weekday: int):
    start = datetime(2026, 1, 5, 9, tzinfo=UTC)
    day = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")[weekday - 1]
    rule = Recurrence(f"FREQ=YEARLY;BYWEEKNO={number};BYDAY={day}", start, UTC_ZONE)
    expected = [day for day in iso_weeks(number, weekday, range(2025, 2060)) if day >= start.date()]
    found = islice(rule.occurrences(start - DAY), len(expected))
    assert [moment.date() for moment in found] == expected


def test_weeks_are_numbered_from_the_end_of_the_year_and_from_their_own_first_day():
    start = datetime(2026, 1, 5, 9, tzinfo=UTC)
    rule = "FREQ=YEARLY;BYWEEKNO=-1,-53;BYDAY=SA;BYHOUR=20,8;BYSETPOS=-2;WKST=SU"
    found = islice(Recurrence(rule, start, UTC_ZONE).occurrences(start), 3)
    assert [str(moment) for moment in found] == [
        "2027-01-02 08:00:00+00:00",  # of the week that began on 27 December, most of it 2026
        "2028-12-30 08:00:00+00:00",  # after 1 January, which is of the last week of 2027
        "2029-12-29 08:00:00+00:00",
    ]


@pytest.mark.parametrize(
    ("rule", "days"),
    [
        ("FREQ=WEEKLY;BYDAY=MO,WE,FR;BYSETPOS=1", [23, 30, 7]),
        ("FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,WE,FR;BYSETPOS=-1;COUNT=2", [20, 4]),
        ("FREQ=WEEKLY;BYDAY=TU,WE;BYSETPOS=2;WKST=WE", [24, 1, 8]),
    ],
)
def test_the_week_of_the_start_counts_as_a_whole(rule: str, days: list[int]):
    start = datetime(2026, 11, 18, 9, tzinfo=UTC)  # a Wednesday
    found = islice(Recurrence(rule, start, UTC_ZONE).occurrences(start - DAY), 3)
    assert [moment.day for moment in found] == days


def test_a_start_within_a_second_occurs_with_that_second():
    start = START + timedelta(microseconds=5)
    assert list(Recurrence("FREQ=DAILY;COUNT=1", start, UTC_ZONE).occurrences(START - DAY)) == [
        START
    ]


@pytest.mark.parametrize("year", [1, 1899, 3001, 9999])
def test_a_start_that_no_calendar_needs_is_refused(year: int):
    with pytest.raises(RecurrenceProblem, match="1900 to 3000") as refused:
        Recurrence("FREQ=DAILY", datetime(year, 1, 1, tzinfo=UTC), BERLIN)
    assert refused.value.about == "dtstart"


@pytest.mark.parametrize("until", ["99991231", "99991231T235959Z"])
def test_until_the_end_of_time_is_for_ever(until: str):
    assert Recurrence(f"FREQ=DAILY;UNTIL={until}", START, BERLIN).after(START) == START + DAY


def test_latest_is_the_last_one_within_its_bounds():
    rule = Recurrence("FREQ=WEEKLY;BYDAY=MO", START, UTC_ZONE)
    monday = datetime(2026, 12, 14, 12, tzinfo=UTC)
    assert rule.latest(monday, START) == monday
    assert rule.latest(monday - timedelta(seconds=1), START) == monday - timedelta(days=7)
    assert rule.latest(monday, monday) is None


LEAP = "BYMONTH=2;BYMONTHDAY=29"


@pytest.mark.parametrize(
    "rule",
    [
        f"FREQ=YEARLY;{LEAP};BYDAY=MO",
        f"FREQ=YEARLY;INTERVAL=11;{LEAP}",
        f"FREQ=YEARLY;INTERVAL=39;{LEAP};BYDAY=SU",
        "FREQ=YEARLY;INTERVAL=30;BYMONTH=12;BYMONTHDAY=25;BYDAY=SU",
        "FREQ=YEARLY;INTERVAL=7;BYYEARDAY=366;BYDAY=MO",
        f"FREQ=MONTHLY;INTERVAL=35;{LEAP};BYDAY=MO",
        f"FREQ=WEEKLY;INTERVAL=100;{LEAP}",
        f"FREQ=DAILY;INTERVAL=100;{LEAP}",
        f"FREQ=HOURLY;INTERVAL=100;{LEAP};BYHOUR=9",
        f"FREQ=MINUTELY;INTERVAL=720;{LEAP};BYDAY=FR;BYHOUR=9;BYMINUTE=0",
    ],
)
def test_however_rare_an_occurrence_is_it_is_found(rule: str):
    start = datetime(2003, 1, 1, 9)  # noqa: DTZ001  # dateutil compares it with its own
    expected = list(islice(rrulestr(rule, dtstart=start), 3))
    found = Recurrence(rule, start.replace(tzinfo=UTC), UTC_ZONE).occurrences(AGES_AGO)
    assert [moment.replace(tzinfo=None) for moment in islice(found, 3)] == expected


def test_what_does_not_occur_again_before_the_end_of_the_calendar_has_ended():
    rule = f"FREQ=YEARLY;INTERVAL=39;{LEAP};BYDAY=SU"
    expected = [each.replace(tzinfo=UTC) for each in rrulestr(rule, dtstart=datetime(2003, 1, 1))]  # noqa: DTZ001  # as above
    found = Recurrence(rule, datetime(2003, 1, 1, tzinfo=UTC), UTC_ZONE)
    assert list(found.occurrences(AGES_AGO)) == expected
    assert found.after(expected[-1]) is None


RULES = st.builds(
    lambda freq, parts: ";".join([f"FREQ={freq}", *(part for part in parts if part)]),
    st.sampled_from(["YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY"]),
    st.tuples(
        st.sampled_from(["", "INTERVAL=2", "INTERVAL=3", "INTERVAL=9"]),
        st.sampled_from(["", "BYDAY=MO", "BYDAY=TU,SU"]),
        st.sampled_from(["", "BYMONTH=2", "BYMONTH=1,12"]),
        st.sampled_from(["", "BYMONTHDAY=1", "BYMONTHDAY=-1", "BYMONTHDAY=28,31"]),
        st.sampled_from(["", "BYHOUR=3", "BYHOUR=0,23"]),
        st.sampled_from(["", "", "BYMINUTE=7", "BYMINUTE=45,0", "BYMINUTE=30;BYSECOND=5"]),
        st.sampled_from(["", "COUNT=1", "COUNT=30"]),
        st.sampled_from(["", "", "BYSETPOS=1", "BYSETPOS=-1"]),
    ),
).filter(lambda rule: not re.match("FREQ=(HOURLY|MINUTELY).*BYSETPOS", rule))


@settings(max_examples=150, deadline=None)
@example(  # a Monday that is a 1 February
    "FREQ=HOURLY;INTERVAL=9;BYDAY=MO;BYMONTH=2;BYMONTHDAY=1;BYHOUR=3;BYMINUTE=7",
    datetime(2025, 1, 1, 3, tzinfo=UTC),
    -DAY,
)
@given(
    rule=RULES,
    start=st.datetimes(datetime(2025, 1, 1), datetime(2026, 12, 28), timezones=st.just(UTC)),  # noqa: DTZ001
    pause=st.timedeltas(-DAY, timedelta(days=400)) | st.timedeltas(-DAY, 9 * DAY),
)
def test_in_utc_it_agrees_with_dateutil(rule: str, start: datetime, pause: timedelta):
    start = start.replace(microsecond=0)
    moment = start + pause
    assert ours(rule, start, moment) == dateutils_own(rule, start, moment)


# As far as dateutil goes from minute to minute within a test; rare ones are compared above.
COMPARED = timedelta(days=39 * 366)


def ours(rule: str, start: datetime, moment: datetime) -> list[datetime]:
    with contextlib.suppress(RecurrenceProblem):  # it never occurs; then dateutil finds nothing
        found = islice(Recurrence(rule, start, UTC_ZONE).occurrences(moment), 4)
        return [occurrence for occurrence in found if occurrence <= moment + COMPARED]
    return []


def whole_weeks(rule: str, start: datetime) -> Iterator[datetime]:
    """Yield what dateutil does, but for BYSETPOS, of which its first week begins with ``start``.

    RFC 5545, 3.3.10: "A set of recurrence instances starts at the beginning of the interval."
    """
    if not re.match("FREQ=WEEKLY.*BY(MONTH)?DAY.*BYSETPOS", rule):
        yield from rrulestr(rule, dtstart=start)
        return
    monday = start - timedelta(days=start.weekday())
    uncounted, count = re.sub(";COUNT=[0-9]+", "", rule), re.search("COUNT=([0-9]+)", rule)
    of_its_own = (each for each in rrulestr(uncounted, dtstart=monday) if each >= start)
    yield from islice(of_its_own, int(count[1]) if count else None)


def test_the_positions_of_the_first_week_count_from_its_beginning():
    start = datetime(2025, 1, 1, tzinfo=UTC)  # a Wednesday, whose week has a Tuesday before it
    rule = "FREQ=WEEKLY;BYDAY=TU,SU;BYSETPOS=1"
    assert ours(rule, start, start - DAY)[:2] == [start + 6 * DAY, start + 13 * DAY]


def dateutils_own(rule: str, start: datetime, moment: datetime) -> list[datetime]:
    found: list[datetime] = []
    try:
        for occurrence in whole_weeks(rule, start):
            if len(found) == 4 or occurrence > moment + COMPARED:
                break
            if occurrence > moment:
                found.append(occurrence)
    except ValueError:  # it can tell by itself that some rules never occur
        return []
    return found
