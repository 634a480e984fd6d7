from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from kanthorq_django.domain.rules import parse
from kanthorq_django.domain.wording import in_words

START = datetime(2026, 11, 20, 9, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("FREQ=DAILY", "every day at 09:05"),
        ("FREQ=DAILY;INTERVAL=2;BYHOUR=2;BYMINUTE=0", "every 2 days at 02:00"),
        ("FREQ=WEEKLY", "every week on Friday at 09:05"),
        ("FREQ=WEEKLY;BYDAY=MO,WE,FR", "every week on Monday, Wednesday and Friday at 09:05"),
        ("FREQ=MONTHLY;BYDAY=-1FR", "every month on the last Friday at 09:05"),
        ("FREQ=MONTHLY;BYDAY=FR", "every month on each Friday at 09:05"),
        ("FREQ=MONTHLY;BYDAY=FR;BYMONTHDAY=13", "every month on Friday on day 13 at 09:05"),
        ("FREQ=YEARLY;BYDAY=MO;BYMONTH=3", "every year on each Monday in March at 09:05"),
        ("FREQ=MONTHLY;BYMONTHDAY=1,-1", "every month on day 1 and the last day at 09:05"),
        ("FREQ=MONTHLY", "every month on day 20 at 09:05"),
        ("FREQ=YEARLY", "every year on 20 November at 09:05"),
        ("FREQ=YEARLY;BYMONTH=5", "every year on day 20 in May at 09:05"),
        ("FREQ=YEARLY;BYMONTH=12;BYDAY=3MO", "every year on the 3rd Monday in December at 09:05"),
        ("FREQ=YEARLY;BYMONTHDAY=1", "every year on day 1 of each month at 09:05"),
        ("FREQ=YEARLY;BYMONTHDAY=1;BYMONTH=5", "every year on day 1 in May at 09:05"),
        ("FREQ=YEARLY;BYWEEKNO=20", "every year on Friday in week 20 at 09:05"),
        ("FREQ=YEARLY;BYWEEKNO=20;BYDAY=MO", "every year on Monday in week 20 at 09:05"),
        ("FREQ=DAILY;BYWEEKNO=20", "every day in week 20 at 09:05"),
        ("FREQ=DAILY;BYHOUR=17,9;BYSECOND=30", "every day at 09:05:30 and 17:05:30"),
        ("FREQ=DAILY;BYHOUR=9,17,9", "every day at 09:05 and 17:05"),
        ("FREQ=WEEKLY;BYDAY=MO,MO", "every week on Monday at 09:05"),
        ("FREQ=HOURLY;BYMINUTE=30,0,30", "every hour at minute 0,30"),
        ("FREQ=HOURLY", "every hour at minute 5"),
        ("FREQ=HOURLY;BYMINUTE=15", "every hour at minute 15"),
        ("FREQ=HOURLY;BYHOUR=17,9;BYMINUTE=0", "every hour at hour 9,17 at minute 0"),
        ("FREQ=MINUTELY;BYSECOND=30", "every minute at second 30"),
        ("FREQ=MINUTELY;INTERVAL=5", "every 5 minutes"),
        ("FREQ=DAILY;COUNT=10", "every day at 09:05 10 times"),
        ("FREQ=DAILY;UNTIL=20261231", "every day at 09:05 until 2026-12-31"),
        ("FREQ=DAILY;UNTIL=20261231T170000", "every day at 09:05 until 2026-12-31 17:00"),
        ("FREQ=DAILY;UNTIL=20261231T235959Z", "every day at 09:05 until 2026-12-31 23:59:59"),
    ],
)
def test_a_rule_reads_as_a_phrase(rule: str, words: str):
    assert in_words(parse(rule), START) == words


@pytest.mark.parametrize(
    ("until", "words"),
    [
        ("20261231T230000Z", "2027-01-01 00:00"),
        ("20260630T220000Z", "2026-07-01 00:00"),
        ("20261231T230000", "2026-12-31 23:00"),
        ("99991231T235959Z", "9999-12-31 23:59:59"),  # where Berlin has no clocks
    ],
)
def test_an_end_is_told_as_the_clocks_of_the_start_show_it(until: str, words: str):
    start = START.astimezone(ZoneInfo("Europe/Berlin"))
    assert in_words(parse(f"FREQ=MINUTELY;UNTIL={until}"), start) == f"every minute until {words}"
