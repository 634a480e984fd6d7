"""What becomes of a schedule whose definition changes, and what a form is told of a wrong one."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.template import Context, Engine
from django.utils import timezone

from kanthorq_django import publish_many, schedule
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.exceptions import InvalidSchedule
from kanthorq_django.models import Event, Schedule
from tests.clock import BrokenZone
from tests.factories import StreamFactory

pytestmark = pytest.mark.django_db

START = datetime(2026, 1, 1, 9, tzinfo=UTC)
LATE = timedelta(days=3)


def daily(**given: Any) -> Schedule:
    options: dict[str, Any] = {"rrule": "FREQ=DAILY", "dtstart": START, "subject": "report.due"}
    return schedule("report", **(options | given))


def miss(kept: Schedule) -> datetime:
    """Let the last three occurrences be missed; return when the first of them was due."""
    assert kept.next_at is not None
    missed_at: datetime = kept.next_at - LATE
    Schedule.objects.filter(pk=kept.pk).update(next_at=missed_at)
    return missed_at


def test_a_new_body_leaves_what_was_missed_to_be_caught_up():
    missed = miss(daily(catchup="all"))

    kept = daily(catchup="all", body={"new": True})

    assert kept.next_at == missed
    assert Schedule.objects.publish_due() == 3
    assert {event.json()["new"] for event in Event.objects.all()} == {True}


@pytest.mark.parametrize(
    "change",
    [
        {"rrule": "FREQ=DAILY;BYHOUR=10"},
        {"dtstart": START - timedelta(hours=1)},
        {"timezone": "Asia/Tokyo"},
        {"exdates": [START]},
    ],
)
def test_a_changed_rule_counts_from_now_on(change: dict[str, Any]):
    miss(daily(catchup="all"))

    kept = daily(catchup="all", **change)

    assert kept.next_at is not None
    assert kept.next_at > timezone.now()
    assert Schedule.objects.publish_due() == 0


@pytest.mark.parametrize(("ago", "published"), [(1, 1), (50, 1), (70, 0)])
def test_a_schedule_that_starts_just_now_has_not_missed_its_start(ago: int, published: int):
    daily(rrule="FREQ=DAILY;COUNT=3", dtstart=timezone.now() - timedelta(seconds=ago))
    assert Schedule.objects.publish_due() == published


def test_an_unchanged_definition_writes_nothing(django_assert_max_num_queries: Any):
    first = daily(metadata={"ids": (1, 2)}, exdates=[START])
    with django_assert_max_num_queries(5) as queries:
        daily(metadata={"ids": (1, 2)}, exdates=[START])
    assert not [query for query in queries if query["sql"].startswith("UPDATE")]
    assert Schedule.objects.get() == first


def test_a_start_may_be_iso_text():
    kept = daily(dtstart="2027-01-01T09:00+01:00")

    assert kept.dtstart == kept.next_at == datetime(2027, 1, 1, 8, tzinfo=UTC)
    assert daily(dtstart="2027-01-01T08:00Z").next_at == kept.next_at
    kept.refresh_from_db()
    assert kept.dtstart == kept.next_at


@pytest.mark.parametrize("start", ["2027-01-01T09:00", "tomorrow", "", "0001-01-01T00:00+14:00"])
def test_text_that_is_no_moment_is_no_start(start: str):
    with pytest.raises(InvalidSchedule, match="dtstart takes aware datetimes"):
        daily(dtstart=start)


@pytest.mark.parametrize(
    ("start", "right"),
    [
        ("2027-01-01T09:00", "2027-01-01T09:00+01:00"),
        ("2027-01-01T09:00:30.5", "2027-01-01T09:00:30+01:00"),
        ("2027-01-01", "2027-01-01T00:00+01:00"),
        ("2027-01-01+01:00", "2027-01-01T01:00+01:00"),  # as Python reads it
    ],
)
def test_text_without_an_offset_is_told_so(start: str, right: str):
    told = f"'{start}' has no offset from UTC: write {right}, for example"
    with pytest.raises(InvalidSchedule, match=re.escape(told)):
        daily(dtstart=start)
    assert daily(dtstart=right).dtstart == datetime.fromisoformat(right)


def create(**given: Any) -> Schedule:
    options: dict[str, Any] = {
        "name": "report",
        "stream": StreamFactory.create(),
        "rrule": "FREQ=DAILY",
        "dtstart": START,
        "timezone": "UTC",
        "subject": "report.due",
    }
    return Schedule.objects.create(**(options | given))


def test_a_schedule_that_django_creates_occurs_as_a_declared_one_does():
    kept = create()

    assert kept.next_at == kept.upcoming()[0]
    assert timezone.now() < kept.next_at <= timezone.now() + timedelta(days=1)
    kept.next_at -= LATE
    kept.save()
    assert Schedule.objects.publish_due() == 1


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"rrule": "FREQ=NEVER"}, "FREQ must be one of .*, not 'NEVER'"),
        ({"timezone": ""}, "'' is not the name of a time zone"),
        ({"dtstart": None}, "dtstart takes aware datetimes"),
        ({"dtstart": datetime(2027, 1, 1, tzinfo=BrokenZone())}, "dtstart takes aware datetimes"),
    ],
)
def test_a_schedule_that_could_never_occur_is_not_created(wrong: dict[str, Any], problem: str):
    with pytest.raises(InvalidSchedule, match=problem):
        create(**wrong)
    assert not Schedule.objects.exists()


def test_a_changed_rule_does_not_bring_a_cancelled_schedule_back():
    daily()
    Schedule.objects.all().cancel()
    assert daily(rrule="FREQ=HOURLY").next_at is None
    assert not Schedule.objects.filter(next_at__isnull=False).exists()


async def _async_cancel_and_resume() -> tuple[Outcome, Outcome]:
    everything = Schedule.objects.all()
    return await everything.acancel(), await everything.aresume()


@pytest.mark.django_db(transaction=True)
def test_cancel_and_resume_have_async_twins():
    from asgiref.sync import async_to_sync

    kept = daily()
    done = Outcome(updated=(kept.pk,))
    assert async_to_sync(_async_cancel_and_resume)() == (done, done)


@pytest.mark.parametrize("verb", ["cancel", "resume", "acancel", "aresume"])
def test_verbs_that_alter_data_stay_out_of_templates_and_off_the_manager(verb: str):
    assert getattr(Schedule.objects.all(), verb).alters_data
    assert not hasattr(Schedule.objects, verb)


def test_no_template_publishes_what_is_due():
    miss(daily())
    for schedules in (Schedule.objects, Schedule.objects.all()):
        assert Engine().from_string("{{ it.publish_due }}").render(Context({"it": schedules})) == ""
    assert not Event.objects.exists()


@pytest.mark.parametrize("verb", ["cancel", "resume"])
def test_verbs_tell_each_id_once_and_in_order(verb: str):
    kept = [schedule(f"report-{i}", rrule="FREQ=DAILY", dtstart=START, subject="a") for i in "abc"]
    pks = tuple(sorted(each.pk for each in kept))
    publish_many([Event(subject="report.due"), Event(subject="report.due")])
    queries = [
        Schedule.objects.order_by("-name"),
        Schedule.objects.order_by("pk").reverse(),
        Schedule.objects.filter(stream__events__subject="report.due"),
        Schedule.objects.filter(stream__events__subject="report.due").distinct(),
    ]
    for schedules in queries:
        getattr(Schedule.objects.all(), "resume" if verb == "cancel" else "cancel")()
        assert getattr(schedules, verb)() == Outcome(updated=pks)
        assert getattr(schedules, verb)() == Outcome(noop=pks)


@pytest.mark.parametrize("verb", ["cancel", "resume"])
def test_one_row_of_each_kind_is_not_moved(verb: str):
    with pytest.raises(TypeError, match=r"after .distinct\(\*fields\)"):
        getattr(Schedule.objects.order_by("name").distinct("name"), verb)()


def test_a_slice_is_not_cancelled():
    with pytest.raises(TypeError, match="slice"):
        Schedule.objects.all()[:1].cancel()


@pytest.mark.parametrize(
    ("wrong", "fields"),
    [
        ({"name": "no spaces"}, {"name"}),
        ({"rrule": "FREQ=DAILY;INTERVAL=0"}, {"rrule"}),
        ({"timezone": "Mars/Olympus"}, {"timezone"}),
        ({"dtstart": datetime(1, 1, 1, tzinfo=UTC)}, {"dtstart"}),
        ({"exdates": ["soon"]}, {"exdates"}),
        ({"exdates": [START.isoformat()] * 1_001}, {"exdates"}),
        ({"exdates": {"a": 1}}, {"exdates"}),
        ({"metadata": {"a": "\x00"}}, {"metadata"}),
        ({"metadata": {"a": "x" * 16_350}}, {"metadata"}),  # too large with the occurrence
        ({"body": b"x" * 300_000}, {"body"}),
        ({"resource_key": "\x07"}, {"resource_key"}),
        ({"subject": "report.*"}, {"subject"}),
        ({"name": "", "rrule": "", "subject": ""}, {"name", "rrule", "subject"}),
        ({"rrule": "FREQ=SECONDLY", "timezone": "Mars", "name": "?"}, {"timezone", "name"}),
    ],
)
def test_a_form_is_told_of_each_wrong_field_once(wrong: dict[str, Any], fields: set[str]):
    kept = daily()
    for name, value in wrong.items():
        setattr(kept, name, value)
    with pytest.raises(ValidationError) as refused:
        kept.full_clean()
    assert {name: len(told) for name, told in refused.value.message_dict.items()} == dict.fromkeys(
        fields, 1
    )


def test_what_became_impossible_has_no_next_occurrence():
    kept = daily()
    miss(kept)
    Schedule.objects.filter(pk=kept.pk).update(timezone="Gone/Zone")
    assert Schedule.objects.publish_due() == 0
    kept.refresh_from_db()
    assert kept.next_at is None
    assert kept.cancelled_at is not None
    with pytest.raises(InvalidSchedule, match="time zone"):
        Schedule.objects.all().resume()


def test_a_rule_that_became_impossible_is_named_with_its_schedule(
    caplog: pytest.LogCaptureFixture,
):
    miss(daily())
    Schedule.objects.update(rrule="FREQ=FORTNIGHTLY")
    assert Schedule.objects.publish_due() == 0
    assert Schedule.objects.get().life == "cancelled"
    assert "Schedule report cannot go on and is cancelled." in caplog.text
    assert "Schedule 'report': FREQ must be one of" in caplog.text


def test_what_became_impossible_can_still_be_looked_at():
    kept = daily()
    kept.timezone, kept.rrule = "Gone/Zone", "FREQ=FORTNIGHTLY"
    assert kept.upcoming() == []
    assert kept.in_words() == "FREQ=FORTNIGHTLY"
    assert kept.local(START) == START


def test_words_of_a_rule_are_told_without_a_search(monkeypatch: pytest.MonkeyPatch):
    kept = daily(timezone="Asia/Tokyo")
    monkeypatch.setattr("kanthorq_django.domain.recurrence._dateutil", None)
    assert kept.in_words() == "every day at 18:00"


def test_exdates_count_in_whole_seconds_as_dtstart_does():
    start = (timezone.now() + timedelta(days=1)).replace(microsecond=123_456)
    made = daily(dtstart=start, exdates=[start + timedelta(days=1)])
    first = start.replace(microsecond=0)
    assert made.upcoming(2) == [first, first + timedelta(days=2)]


def test_what_was_published_does_not_come_again_when_the_clock_was_set_back_a_little():
    kept = create(rrule="FREQ=MINUTELY;BYSECOND=0")
    assert kept.next_at is not None
    kept.last_at = published = kept.next_at
    kept.set_next_at("default")
    assert kept.next_at == published + timedelta(minutes=1)


def test_an_old_instance_that_is_saved_keeps_what_moved_meanwhile():
    old = create(catchup="all")
    miss(old)
    assert Schedule.objects.publish_due() == 3
    Schedule.objects.filter(pk=old.pk).cancel()
    moved = Schedule.objects.get()

    old.body = b"new"
    old.save()

    assert (old.next_at, old.last_at, old.cancelled_at) == (None, moved.last_at, moved.cancelled_at)
    stored = Schedule.objects.get()
    assert (stored.last_at, stored.life) == (moved.last_at, "cancelled")
    assert bytes(stored.body) == b"new"
    assert Schedule.objects.all().resume() == Outcome((old.pk,))
    assert Schedule.objects.publish_due() == 0


@pytest.mark.parametrize("update_fields", [None, ["rrule"]])
def test_another_rule_that_is_saved_counts_from_now_on(update_fields: list[str] | None):
    kept = create(catchup="all")
    miss(kept)

    kept.rrule = "FREQ=YEARLY"
    kept.save(update_fields=update_fields)

    upcoming = kept.upcoming()[0]
    assert kept.next_at == upcoming == Schedule.objects.get().next_at
    assert upcoming > timezone.now()


def test_what_update_or_create_changes_counts_from_now_on():
    miss(create(catchup="all"))
    Schedule.objects.update_or_create(name="report", defaults={"rrule": "FREQ=DAILY;BYHOUR=10"})
    assert Schedule.objects.publish_due() == 0


def test_what_is_set_on_an_instance_is_saved_and_as_it_was_read_after_a_refresh():
    kept = create()
    kept.next_at = START
    kept.save()
    assert Schedule.objects.get().next_at == START

    Schedule.objects.update(next_at=START - LATE)
    kept.refresh_from_db()
    Schedule.objects.update(next_at=START + LATE)
    kept.save()
    assert Schedule.objects.get().next_at == kept.next_at == START + LATE


def test_what_cannot_be_kept_is_refused_where_it_is_written():
    kept = create()
    kept.rrule = "FREQ=NEVER"
    with pytest.raises(InvalidSchedule, match="FREQ must be one of"):
        kept.save()
    assert Schedule.objects.get().rrule == "FREQ=DAILY"

    kept.save(update_fields=["resource_key"])  # what is wrong elsewhere does not keep it


def test_columns_that_were_not_loaded_are_not_written():
    create()
    kept = Schedule.objects.only("name").get()
    Schedule.objects.update(resource_key="r")
    kept.name = "other"
    kept.save()
    stored = Schedule.objects.get()
    assert (stored.name, stored.resource_key) == ("other", "r")


def test_a_copy_occurs_by_its_own_rule_and_has_not_occurred_yet():
    kept = create()
    miss(kept)
    Schedule.objects.publish_due()
    copy = Schedule.objects.get()
    copy.pk, copy._state.adding = uuid7(), True
    copy.name, copy.rrule = "copy", "FREQ=YEARLY"
    copy.save()
    assert copy.next_at == copy.upcoming()[0] == Schedule.objects.get(name="copy").next_at
    assert copy.last_at is None


def test_an_occurrence_that_was_published_is_left_out_when_its_schedule_is_set_back():
    kept = create(catchup="all")
    missed = miss(kept)
    assert Schedule.objects.publish_due() == 3
    Schedule.objects.update(next_at=missed - timedelta(days=1), body=b"new")
    assert Schedule.objects.publish_due() == 1
    assert Schedule.objects.get().life == "active"
    assert Event.objects.filter(body=b"new").count() == 1


def test_a_schedule_that_django_creates_takes_what_a_declared_one_takes():
    given = {
        "dtstart": "2027-01-01T09:00+01:00",
        "exdates": [datetime(2027, 1, 2, 8, tzinfo=UTC)],
        "body": {"kind": "daily"},
    }
    made, declared = create(name="made", **given), daily(timezone="UTC", **given)
    for kept in (made, Schedule.objects.get(name="made")):
        assert (kept.dtstart, kept.exdates) == (declared.dtstart, declared.exdates)
        assert bytes(kept.body) == declared.body
        assert kept.upcoming() == declared.upcoming()
