from datetime import UTC, datetime, timedelta

import pytest
from django.utils import timezone

from kanthorq_django.management.times import (
    format_duration,
    format_moment,
    format_recorded,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("7d", timedelta(days=7)),
        ("12h", timedelta(hours=12)),
        ("30m", timedelta(minutes=30)),
        ("90s", timedelta(seconds=90)),
        ("2w", timedelta(weeks=2)),
        ("1d12h", timedelta(days=1, hours=12)),
        ("0s", timedelta(0)),
        ("36500d", timedelta(days=36_500)),
    ],
)
def test_durations_are_numbers_with_units(text: str, duration: timedelta):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text",
    ["", "7", "d", "-7d", "7 d", "7D", "1.5h", "7d!", "\u0667d", "1e3s", "7days", "1234567890s"],
)
def test_anything_else_is_refused_with_examples(text: str):
    with pytest.raises(ValueError, match=r"is not a duration; write .* such as 7d"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["36501d", "999999999w", "999999999d" * 9])
def test_a_duration_that_reaches_beyond_all_time_is_refused(text: str):
    with pytest.raises(ValueError, match="too long; the limit is 36,500 days"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(0), "0s"),
        (timedelta(seconds=59.9), "59s"),
        (timedelta(minutes=3, seconds=5), "3m5s"),
        (timedelta(hours=2), "2h"),
        (timedelta(days=2, hours=4, minutes=30), "2d4h"),
        (timedelta(days=2, minutes=30), "2d"),
        (timedelta(seconds=-5), "0s"),
    ],
)
def test_durations_are_written_in_their_two_largest_units(duration: timedelta, text: str):
    assert format_duration(duration) == text


def test_moments_are_written_to_the_second_in_the_current_time_zone_with_its_offset():
    moment = datetime(2026, 11, 20, 16, 5, 9, 17, tzinfo=UTC)
    assert format_moment(moment) == "2026-11-20 16:05:09+00:00"
    with timezone.override("Europe/Berlin"):
        assert format_moment(moment) == "2026-11-20 17:05:09+01:00"
    assert format_moment(datetime(2026, 11, 20, 16, 5)) == "2026-11-20 16:05:00"  # noqa: DTZ001  # USE_TZ off
    assert format_moment(None) == "-"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ("2026-11-20T16:05:09.000017+00:00", "2026-11-20 17:05:09+01:00"),
        ("2026-11-20T16:05:09Z", "2026-11-20 17:05:09+01:00"),
        ("2026-11-20T16:05:09", "2026-11-20T16:05:09"),
        ("2026-11-20", "2026-11-20"),
        ("9999-12-31T23:59:59+00:00", "9999-12-31 23:59:59+00:00"),
        ("0001-01-01T00:00:00+15:00", "0001-01-01 00:00:00+15:00"),
        ("2026-02-30T00:00:00+00:00", "2026-02-30T00:00:00+00:00"),
        ("then\x00\ud800", "then\x00\ud800"),
        ("", ""),
        (5, "5"),
        (None, "-"),
        ([], "[]"),
    ],
)
def test_what_a_history_holds_is_a_moment_where_it_can_be_one(stored: object, text: str):
    with timezone.override("Europe/Berlin"):
        assert format_recorded(stored) == text
