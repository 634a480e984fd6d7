"""Moments that SQL can write and Python cannot hold: they keep nothing else from being read."""

from datetime import datetime
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from django.test import Client
from pytest_django import Settings

from kanthorq_django import publish, subscribe
from kanthorq_django.domain.moments import YEAR_MAX, YEAR_MIN
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.cursor import NO_FLOOR, peek
from kanthorq_django.models.registration import Registration
from kanthorq_django.testing import drain
from kanthorq_django.worker.pulling.floors import Floors
from tests.admin.pages import page
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

EARLY = ["-infinity", "4714-11-24 00:00:00+00 BC", "0001-01-01 00:00:00+00"]
LATE = ["9999-12-31 23:59:59.999999+00", "294276-12-31 23:59:59+00", "infinity"]
WILD = {**dict.fromkeys(EARLY, YEAR_MIN), **dict.fromkeys(LATE, YEAR_MAX)}


@pytest.fixture
def consumer() -> Consumer:
    return Consumer.objects.register("reader", Registration("s", includes=[">"]))


def execute(statement: str, *params: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)


def insert_event(column: str, moment: str) -> None:
    """Write an event into the stream ``s`` past ``publish()``, as the login of a publisher may."""
    execute(
        f"""
        INSERT INTO kanthorq_django_event
            (id, stream_id, subject, body, metadata, resource_key, {column})
        SELECT gen_random_uuid(), id, 'a.wild', '', '{{}}', '', %s::timestamptz
        FROM kanthorq_django_stream WHERE name = 's'
        """,  # noqa: S608  # a column of this file
        moment,
    )


def set_tasks(column: str, moment: str) -> None:
    execute(f"UPDATE kanthorq_django_task SET {column} = %s::timestamptz", moment)  # noqa: S608


def year_of(moment: datetime | None) -> int:
    assert moment is not None
    return moment.year


@pytest.mark.parametrize("moment", EARLY)
def test_an_event_due_before_all_years_is_pulled_with_the_others(consumer: Consumer, moment: str):
    insert_event("schedule_at", moment)
    publish("a.b", stream="s")

    wild, tame = consumer.pull()

    assert year_of(wild.event.schedule_at) == YEAR_MIN
    assert tame.event.schedule_at is None


@pytest.mark.parametrize("moment", LATE)
def test_an_event_due_after_all_years_waits_and_keeps_no_other_waiting(
    consumer: Consumer, moment: str
):
    insert_event("schedule_at", moment)
    tame = publish("a.b", stream="s")

    assert [task.event_id for task in consumer.pull()] == [tame.pk]
    assert Task.objects.available().count() == 1


@pytest.mark.parametrize(("moment", "year"), WILD.items())
def test_an_event_of_any_age_is_pulled(consumer: Consumer, moment: str, year: int):
    insert_event("created_at", moment)

    (task,) = consumer.pull()

    assert year_of(task.event.created_at) == year


@pytest.mark.parametrize(("moment", "year"), WILD.items())
def test_every_time_zone_can_tell_it(
    consumer: Consumer, settings: Settings, moment: str, year: int
):
    settings.USE_TZ = False
    for settings.TIME_ZONE in ("America/New_York", "Asia/Tokyo"):
        insert_event("created_at", moment)
        (task,) = consumer.pull()
        assert abs(year_of(task.event.created_at) - year) <= 1


@pytest.mark.parametrize("moment", EARLY)
def test_it_is_drained_inside_a_transaction(moment: str):
    seen: dict[str, Event] = {}

    @subscribe("a.>", stream="s", consumer="reader")
    def handle(message: Message) -> None:
        seen[message.event.subject] = message.event

    with transaction.atomic():
        publish("a.b", stream="s")
        insert_event("schedule_at", moment)
        assert drain("reader") == 2
    assert year_of(seen["a.wild"].schedule_at) == YEAR_MIN


@pytest.mark.parametrize("column", ["created_at", "cancel_requested_at"])
@pytest.mark.parametrize(("moment", "year"), WILD.items())
def test_a_task_with_any_moment_is_claimed(column: str, moment: str, year: int):
    consumer = ConsumerFactory.create(has_cancel_handler=True)
    TaskFactory.create(consumer=consumer, state=TaskState.CANCELLING, schedule_at=Now())
    set_tasks(column, moment)

    (task,) = consumer.claim()

    assert year_of(getattr(task, column)) == year


@pytest.mark.parametrize(("moment", "year"), WILD.items())
def test_a_task_of_an_event_with_any_moments_is_claimed(moment: str, year: int):
    consumer = ConsumerFactory.create()
    TaskFactory.create(consumer=consumer)
    execute("UPDATE kanthorq_django_event SET created_at = %s, schedule_at = %s", moment, moment)

    (task,) = consumer.claim()

    assert year_of(task.event.created_at) == year_of(task.event.schedule_at) == year


def test_what_an_event_has_no_moment_for_stays_without(consumer: Consumer):
    TaskFactory.create(consumer=consumer)

    (task,) = consumer.claim()

    assert (task.event.schedule_at, task.cancel_requested_at) == (None, None)


@pytest.mark.parametrize("moment", EARLY)
def test_a_turn_that_is_due_before_all_years_is_found_and_stops_no_look(moment: str):
    consumer, other = ConsumerFactory.create(serialize="on"), ConsumerFactory.create()
    TaskFactory.create(consumer=consumer, turn_key="a")
    set_tasks("schedule_at", moment)

    looks = peek({consumer.pk: NO_FLOOR, other.pk: NO_FLOOR}, CLAIMABLE, "default")

    assert [row.id for row in looks if row.turn_at is not None] == [consumer.pk]
    assert len(consumer.claim()) == 1


@pytest.mark.parametrize(
    "moment", [*EARLY, "0003-01-01 00:00:00+00", "1500-06-05 04:03:02.000003+00"]
)
def test_a_task_that_is_due_before_all_years_is_found_where_the_look_tells_to_begin(moment: str):
    consumer = ConsumerFactory.create()
    TaskFactory.create(consumer=consumer)
    set_tasks("schedule_at", moment)
    floors = Floors([consumer.pk])

    floors.learn(rows := peek(floors.begin(), CLAIMABLE, "default"))

    assert rows[0].due_at < 0
    assert len(claim_due(consumer, 1, CLAIMABLE, floors[consumer.pk])) == 1


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize("moment", WILD)
def test_pages_and_listings_tell_it(
    admin_client: Client, settings: Settings, moment: str, zone: str
):
    settings.TIME_ZONE = zone
    task = TaskFactory.create(attempt_count=1)
    for column in ("schedule_at", "attempted_at", "cancel_requested_at", "created_at"):
        set_tasks(column, moment)
    execute("UPDATE kanthorq_django_event SET created_at = %s, schedule_at = %s", moment, moment)

    for noun, row in (("task", task), ("event", task.event), ("stream", task.consumer.stream)):
        assert admin_client.get(page(f"{noun}_changelist")).status_code == 200
        assert admin_client.get(page(f"{noun}_change", row.pk)).status_code == 200
    (listed,) = kanthorq("tasks", "list", "--json").json
    assert listed["schedule_at"][:4] in {f"{WILD[moment]:04}", f"{WILD[moment] + 1:04}"}
    for verb in ("list", "show"):
        assert str(task.event_id) in kanthorq("tasks", verb, "--event", task.event_id).out


def test_what_has_no_moment_is_read_as_none():
    task = TaskFactory.create()
    assert (task.finalized_at, task.event.schedule_at) == (None, None)


@pytest.mark.parametrize("moment", WILD)
def test_the_lag_of_a_stream_with_any_moments_is_told(consumer: Consumer, moment: str):
    insert_event("created_at", moment)

    lag = consumer.lag()

    assert lag.count == 1
    assert lag.oldest is not None
    (stream,) = kanthorq("stats", "--json").json["streams"]
    assert stream["oldest_seconds"] == stream["newest_seconds"]


@pytest.mark.parametrize("moment", EARLY)
@pytest.mark.parametrize("turn_key", ["a", None])
def test_a_task_that_waits_since_ever_is_in_the_statistics(turn_key: str | None, moment: str):
    TaskFactory.create(turn_key=turn_key)
    set_tasks("schedule_at", moment)

    (told,) = kanthorq("stats", "--json").json["consumers"]

    assert told["oldest_due_seconds"] > 0
    assert "tasks" in kanthorq("health").out
