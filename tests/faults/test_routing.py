"""A router sends reads to a replica, which knows less: decisions are made on the primary."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from kanthorq_django import publish, schedule, subscribe
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.models import Event, OperatorAction, Schedule, Stream, Task, TaskState
from kanthorq_django.subscribers import sync
from tests.admin.pages import page, press, tick
from tests.factories import TaskFactory
from tests.faults.ground import Ground, View
from tests.faults.stage import Stage
from tests.worker.working import accept, announce, work_off

REPLAYED = "SELECT pg_last_wal_replay_lsn() >= %s"
CANCELLED = "SELECT EXISTS (SELECT FROM kanthorq_django_task WHERE state = -101)"


def test_workers_and_publishers_whose_reads_go_to_a_stale_standby_work_on_the_primary(
    pair: tuple[Stage, Ground],
):
    stage, standby = pair
    stale = View(standby.server.socket_dir, stage.view.name)
    replica = str(standby.server.socket_dir)
    workers = [stage.worker(FAULTS_REPLICA=replica), stage.worker(FAULTS_REPLICA=replica)]
    client = stage.client(FAULTS_REPLICA=replica)
    stage.wait_until_started()

    def has_cancelled_some() -> bool:
        client.do("both 20")
        return bool(stage.view.value(CANCELLED))

    stage.wait_until(has_cancelled_some)
    written = stage.view.value("SELECT pg_current_wal_lsn()")
    stage.wait_until(lambda: stale.value(REPLAYED, written))
    stale.value("SELECT pg_wal_replay_pause() IS NULL")
    client.do("both 40")
    client.do("tick 5")

    stage.settle()

    assert len(stale.tasks()) < len(stage.view.tasks()), "the standby was not stale"
    assert all(worker.is_running for worker in workers)
    facts = stage.check()
    assert any(operation.updated for operation in facts.operations)


@pytest.fixture
def routed(settings: Any) -> None:
    """Let reads go to a database that has the tables, and not one row."""
    settings.DATABASE_ROUTERS = ["tests.faults.routers.ReadsFromOther"]


@pytest.fixture
def waiting(transactional_db: None) -> Task:
    return TaskFactory.create(state=TaskState.AVAILABLE)


BEGINNING = dict.fromkeys(("after", "updated", "requested", "noop"), 0)
WAYS: dict[str, Callable[[Client, Task], Any]] = {
    "ticked in the list": lambda client, task: tick(client, "cancel", [task]),
    "all that match": lambda client, task: tick(
        client, "cancel", [task], select_across="1", confirmed="1", through=task.pk, **BEGINNING
    ),
    "the button": lambda client, task: press(client, "cancel", task),
    "the queryset": lambda _, task: Task.objects.filter(pk=task.pk).cancel(),
    "the consumer": lambda _, task: task.consumer.cancel([task.event_id]),
    "the command": lambda _, task: call_command(
        "kanthorq", "tasks", "cancel", "--event", str(task.event_id), "--yes"
    ),
}

two_databases = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@two_databases
@pytest.mark.parametrize("way", WAYS)
def test_operators_change_what_the_primary_has(
    waiting: Task, admin_client: Client, routed: None, way: str
):
    assert not Task.objects.exists(), "the router was not asked"

    WAYS[way](admin_client, waiting)

    assert Task.objects.using("default").get(pk=waiting.pk).state == TaskState.CANCELLED


@two_databases
@pytest.mark.parametrize("verb", ["cancel", "delete_selected"])
def test_operators_change_schedules_that_the_primary_has(
    admin_client: Client, routed: None, verb: str
):
    name = "nightly"
    began = timezone.now()
    made = schedule(name, rrule="FREQ=DAILY", dtstart=began, subject="night.fell", stream="shop")
    data = {"action": verb, "index": "0", "_selected_action": [str(made.pk)], "post": "yes"}

    admin_client.post(page("schedule_changelist"), data)

    kept = Schedule.objects.using("default").filter(name=name, cancelled_at=None)
    assert not kept.exists()
    (told,) = OperatorAction.objects.using("default").values_list("sample", flat=True)
    assert told == [name]


@two_databases
def test_an_event_whose_key_only_the_primary_knows_is_published_once(
    transactional_db: None, routed: None
):
    first = publish("order.paid", stream="shop", idempotency_key="once")
    again = publish("order.paid", stream="shop", idempotency_key="once")

    assert again.pk == first.pk
    assert Event.objects.using("default").count() == 1


@two_databases
def test_a_schedule_whose_stream_only_the_primary_knows_is_declared_again(
    transactional_db: None, routed: None
):
    declare = partial(schedule, "nightly", rrule="FREQ=DAILY", dtstart=timezone.now())
    first = declare(subject="night.fell", stream="shop")
    again = declare(subject="night.fell", stream="shop")

    assert again == first
    assert again.stream == Stream.objects.using("default").get(name="shop")


@two_databases
def test_a_worker_begins_with_a_stream_that_only_the_primary_knows(
    transactional_db: None, routed: None
):
    accept("new")
    announce(2)

    assert work_off("new") == 2
    assert Task.objects.using("default").completed().count() == 2


@two_databases
def test_a_consumer_that_cannot_move_is_told_of_a_stream_that_only_the_primary_knows(
    transactional_db: None, routed: None
):
    accept("kept")
    sync(["kept"])
    subscribe("work.>", stream="elsewhere", consumer="kept")(lambda message: None)

    with pytest.raises(ConfigurationError, match="reads the stream 'work'"):
        sync(["kept"])
