from datetime import timedelta
from typing import Any

import pytest
from django.core.management.base import CommandError
from django.db import connection, connections
from django.db.models.functions import Now

from kanthorq_django import publish, subscribe
from kanthorq_django.models import Consumer, Stream, TaskState, Worker
from kanthorq_django.models.maintenance.health import CHECKS, Limits, Status, examine
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_statistics", "undeclared")]

LONG = Now() - timedelta(hours=1)


@pytest.fixture
def worker() -> Worker:
    return Worker.objects.create(host="here", pid=1, concurrency=10)


@pytest.fixture
def consumer() -> Consumer:
    """A consumer that code declares."""
    subscribe("order.>", stream="orders", consumer="refunds")(lambda message: None)
    return ConsumerFactory.create(name="refunds", stream__name="orders")


def failed() -> dict[str, str]:
    findings = examine("default")
    return {finding.check: finding.detail for finding in findings if finding.status != "ok"}


@pytest.mark.usefixtures("worker", "consumer")
def test_a_healthy_system_exits_with_0():
    ran = kanthorq("health")

    assert ran.status == 0
    assert [(line.split()[0], line.split()[1]) for line in ran.lines] == [
        ("ok", check) for check in CHECKS
    ]


def test_anything_wrong_exits_with_1():
    ran = kanthorq("health")

    assert ran.status == 1
    assert "failed   workers        0 alive, 0 gone silent; at least 1 wanted" in ran.lines


def test_json_tells_the_same():
    ran = kanthorq("health", "--json")

    assert ran.status == 1
    assert ran.json["healthy"] is False
    assert [check["name"] for check in ran.json["checks"]] == list(CHECKS)
    assert {check["name"] for check in ran.json["checks"] if check["status"] == "failed"} == {
        "workers"
    }


def test_checks_can_be_left_out_and_limits_moved():
    assert kanthorq("health", "--skip", "workers").status == 0
    assert kanthorq("health", "--min-workers", 0).status == 0


def test_workers_gone_silent_do_not_count(worker: Worker):
    Worker.objects.update(seen_at=LONG)

    assert failed() == {"workers": "0 alive, 1 gone silent; at least 1 wanted"}


@pytest.mark.usefixtures("worker")
def test_a_lease_that_ran_out_unnoticed_is_found(consumer: Consumer):
    TaskFactory.create(
        consumer=consumer, state=TaskState.RUNNING, schedule_at=Now() - timedelta(minutes=2)
    )

    assert "refunds 1; is a worker running?" in failed()["stuck"]
    assert kanthorq("health", "--max-stuck", "3m").status == 0


@pytest.mark.usefixtures("worker")
def test_a_due_task_that_waits_too_long_is_found(consumer: Consumer):
    TaskFactory.create(consumer=consumer, schedule_at=LONG)

    assert failed()["due"].startswith("due tasks wait longer than 0:05:00: refunds 1:00:0")
    assert kanthorq("health", "--max-due", "2h", "--skip", "lag").status == 0


@pytest.mark.usefixtures("worker")
def test_tasks_of_the_future_are_not_late(consumer: Consumer):
    TaskFactory.create(consumer=consumer, schedule_at=Now() + timedelta(days=1))

    assert failed() == {}


@pytest.mark.usefixtures("worker")
def test_a_consumer_far_behind_its_stream_is_found(consumer: Consumer):
    event = EventFactory.create(stream=consumer.stream)
    type(event)._base_manager.update(created_at=LONG)

    ((check, told),) = failed().items()
    assert check == "lag"
    assert told.startswith("unread events wait longer than 0:05:00: refunds 1:00:0")
    assert kanthorq("health", "--max-lag", "2h").status == 0


@pytest.mark.usefixtures("worker", "consumer")
def test_a_declared_consumer_that_the_database_does_not_know_is_found():
    for name in ("parcels", "books"):
        subscribe("order.>", stream="orders", consumer=name)(lambda message: None)

    what = "not known to the database: books, parcels"
    assert failed() == {"declared": f"{what}; start a worker, or run manage.py kanthorq sync"}
    assert kanthorq("health", "--skip", "declared").status == 0

    kanthorq("sync")
    assert failed() == {}


def test_what_is_declared_is_looked_at_right_before_orphans():
    names = list(CHECKS)
    assert names[names.index("declared") + 1] == "orphans"


@pytest.mark.usefixtures("worker")
def test_work_for_a_consumer_without_code_is_found_once():
    TaskFactory.create(consumer__name="bygone", schedule_at=LONG)

    assert failed() == {"orphans": "work waits for consumers that no code declares: bygone"}


@pytest.mark.usefixtures("worker")
def test_a_consumer_without_code_and_without_work_is_fine():
    ConsumerFactory.create(name="bygone")

    assert failed() == {}


@pytest.mark.usefixtures("worker")
def test_events_that_no_consumer_reads_are_found(consumer: Consumer):
    publish("order.paid", stream=consumer.stream.name)
    publish("order.paid", stream="oders")
    publish("order.paid")
    Stream.objects.register("empty")

    told = "no consumer reads what is published into 'default', 'oders'"
    assert failed() == {"streams": told}
    ConsumerFactory.create(stream=Stream.objects.get(name="default"))
    assert failed()["streams"] == "no consumer reads what is published into 'oders'"
    assert kanthorq("health", "--skip", "streams", "--skip", "orphans").status == 0


@pytest.mark.usefixtures("worker")
def test_only_consumers_that_are_named_are_looked_after(consumer: Consumer):
    subscribe("click", stream="clicks", consumer="clicks")(lambda message: None)
    assert "declared" in failed()
    assert kanthorq("health", consumer.name).status == 0
    ran = kanthorq("health", consumer.name, "clicks")
    assert ran.status == 1
    (told,) = [line for line in ran.lines if line.startswith("failed")]
    assert "not known to the database: clicks;" in told
    with pytest.raises(CommandError, match="clocks"):
        kanthorq("health", "clocks")


@pytest.mark.usefixtures("worker")
def test_a_cursor_of_another_cluster_asks_for_a_rebase(consumer: Consumer):
    Consumer.objects.update(cluster_id=17)

    assert "refunds; stop the workers and run manage.py kanthorq rebase" in failed()["cluster"]


@pytest.mark.django_db(transaction=True)
def test_a_transaction_open_for_too_long_is_found(worker: Worker):
    other = connections.create_connection("default")
    try:
        other.set_autocommit(False)
        with other.cursor() as cursor:
            cursor.execute("SELECT 1")
        ran = kanthorq("health", "--max-transaction", "0s")
        assert ran.status == 1
        assert "failed   transactions" in ran.out
    finally:
        other.close()


def test_an_unmigrated_database_is_told_and_the_rest_is_skipped():
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM django_migrations WHERE app = 'kanthorq_django'")

    findings = examine("default")

    by_check = {finding.check: finding for finding in findings}
    assert by_check["migrations"].status is Status.FAILED
    assert "run manage.py migrate" in by_check["migrations"].detail
    assert {by_check[name].status for name in list(CHECKS)[4:]} == {Status.SKIPPED}


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--skip", "lags"), "invalid choice: 'lags'"),
        (("--max-lag", "5"), "is not a duration"),
        (("--min-workers", "-1"), "must be a whole number from 0"),
        (("--max-notification-queue", "2"), "must be a number from 0 to 1"),
        (("--max-notification-queue", "nan"), "must be a number from 0 to 1"),
    ],
)
def test_a_wrong_limit_is_one_sentence(arguments: tuple[str, ...], fact: str):
    with pytest.raises(CommandError, match=fact):
        kanthorq("health", *arguments)


def test_what_is_wrong_with_the_server_itself_is_found():
    """Facts that a test cannot bring about."""

    class Server:
        version_name, version, is_standby = "14.9", 14, True
        queue_usage, oldest_transaction = 0.5, timedelta(hours=2)
        sees_all_sessions = True

    patient: Any = type("Patient", (), {"server": Server, "limits": Limits()})

    for check in ("version", "primary", "notifications", "transactions"):
        is_ok, detail = CHECKS[check](patient)
        assert not is_ok, detail
