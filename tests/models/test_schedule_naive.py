"""Schedules where ``USE_TZ`` is off: Django reads naive times, and a rule counts in moments."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import connection
from django.db.models import F
from django.test import Client

from kanthorq_django import schedule
from kanthorq_django.exceptions import InvalidSchedule
from kanthorq_django.models import Event, Schedule, Stream
from kanthorq_django.models.fields import database_now
from tests.admin.pages import page
from tests.admin.schedules import filled, shown_in
from tests.commands.console import kanthorq

pytestmark = pytest.mark.django_db

BERLIN = ZoneInfo("Europe/Berlin")
HOUR = timedelta(hours=1)
FIRST = datetime(2027, 10, 31, 0, 30, tzinfo=UTC)  # 02:30 in Berlin, and an hour later again
TurnOff = Callable[[], None]


@pytest.fixture
def turn_off(settings: Any) -> TurnOff:
    def turn_off() -> None:
        settings.USE_TZ, settings.TIME_ZONE = False, "Europe/Berlin"

    return turn_off


@pytest.fixture
def use_tz_off(turn_off: TurnOff) -> None:
    turn_off()


def minutely(**given: Any) -> Schedule:
    options: dict[str, Any] = {
        "rrule": "FREQ=MINUTELY",
        "dtstart": datetime.now(UTC).replace(second=0, microsecond=0) + HOUR,
        "timezone": "Europe/Berlin",
        "subject": "report.due",
        "stream": "reports",
    }
    return schedule("report", **(options | given))


def let_pass(kept: Schedule, span: timedelta) -> None:
    Schedule.objects.filter(pk=kept.pk).update(next_at=F("next_at") - span)


@pytest.mark.usefixtures("use_tz_off")
def test_a_schedule_is_published_and_steps_on():
    kept = minutely(dtstart=datetime.now(UTC) - HOUR)
    let_pass(kept, timedelta(minutes=1))

    assert Schedule.objects.publish_due() == 1
    kept.refresh_from_db()
    assert kept.last_at is not None
    assert kept.next_at is not None
    assert Event.objects.get().metadata["occurrence"] == kept.last_at.isoformat()
    assert database_now("default") < kept.next_at
    assert kept.upcoming(2) == [kept.next_at, kept.next_at + timedelta(minutes=1)]


def test_a_schedule_that_was_written_before_goes_on(turn_off: TurnOff):
    kept = minutely(dtstart=datetime.now(UTC) - HOUR)
    let_pass(kept, timedelta(minutes=1))
    turn_off()

    assert Schedule.objects.publish_due() == 1
    assert Schedule.objects.get().life == "active"


@pytest.mark.usefixtures("use_tz_off")
def test_a_cancelled_schedule_goes_on_once_resumed():
    minutely()
    Schedule.objects.all().cancel()

    assert Schedule.objects.all().resume().updated
    assert len(Schedule.objects.get().upcoming()) == 5


@pytest.mark.usefixtures("use_tz_off")
def test_an_unchanged_definition_writes_nothing():
    start = datetime.now(UTC)
    kept = minutely(dtstart=start)
    let_pass(kept, 5 * HOUR)
    before = Schedule.objects.get().next_at
    minutely(dtstart=start)

    assert Schedule.objects.get().next_at == before != kept.next_at


@pytest.mark.usefixtures("use_tz_off")
@pytest.mark.parametrize("moment", [FIRST, FIRST + HOUR])
def test_a_time_that_comes_twice_is_stored_as_the_one_it_is(moment: datetime):
    minutely(dtstart=moment, timezone="UTC")

    kept = Schedule.objects.get()
    assert (kept.dtstart, kept.next_at) == (moment, moment)
    kept.save()
    assert Schedule.objects.get().next_at == moment
    seconds = Schedule.objects.all().seconds_to_next()
    assert seconds == pytest.approx((moment - datetime.now(UTC)).total_seconds(), abs=60)


@pytest.mark.usefixtures("use_tz_off")
def test_a_naive_start_is_refused_all_the_same():
    with pytest.raises(InvalidSchedule, match="dtstart takes aware datetimes"):
        minutely(dtstart=datetime(2027, 1, 1, 9))  # noqa: DTZ001  # on purpose


@pytest.mark.usefixtures("use_tz_off")
def test_people_write_and_change_schedules_in_the_admin(admin_client: Client):
    stream = Stream.objects.register("reports")
    sent = filled(stream, dtstart="2027-01-04T09:00", exdates="2027-01-11 09:00\r\n")

    assert admin_client.post(page("schedule_add"), sent).status_code == 302
    kept = Schedule.objects.get()
    assert kept.next_at == datetime(2027, 1, 4, 9, tzinfo=BERLIN)
    shown = shown_in(admin_client, kept)
    assert (shown["dtstart"], shown["exdates"]) == ("2027-01-04T09:00", "2027-01-11 09:00")
    left_out = shown | {"exdates": "2027-01-18 09:00\n2027-01-19 09:00"}
    assert admin_client.post(page("schedule_change", kept.pk), left_out).status_code == 302
    assert admin_client.get(page("schedule_changelist")).status_code == 200
    assert Schedule.objects.get().dtstart == kept.dtstart


@pytest.mark.usefixtures("use_tz_off")
def test_a_command_shows_times_of_the_zone_of_the_schedule():
    minutely(dtstart=datetime(2027, 1, 4, 9, tzinfo=BERLIN), timezone="Asia/Tokyo")

    assert "Mon 2027-01-04 17:00:00 JST" in kanthorq("schedules", "show", "report").out
    assert "2027-01-04 17:00:00+09:00" in kanthorq("schedules", "list").out


def test_a_naive_time_is_that_of_the_connections_zone(turn_off: TurnOff):
    kept = minutely(dtstart=datetime(2027, 1, 4, 9, tzinfo=BERLIN))
    turn_off()
    with connection.cursor() as cursor:
        cursor.execute("SELECT dtstart FROM kanthorq_django_schedule")
        assert cursor.fetchone()[0] == datetime(2027, 1, 4, 9)  # noqa: DTZ001  # as Django reads
    assert Schedule.objects.get().dtstart == kept.dtstart
