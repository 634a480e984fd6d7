"""Projects whose transactions are stricter than READ COMMITTED by default."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models.signals import pre_delete
from django.db.transaction import TransactionManagementError
from django.test import Client

from kanthorq_django import publish, publish_many
from kanthorq_django.admin.event import EventAdmin
from kanthorq_django.exceptions import InvalidEvent
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Stream, Task, TaskState
from kanthorq_django.models.delivery.turns import Serialize
from kanthorq_django.models.isolation import unconflicted
from kanthorq_django.models.maintenance.retention import Pruned, prune
from kanthorq_django.models.publishing.inspection import SLICE_SIZE
from kanthorq_django.models.registration import Registration
from tests.admin.pages import page
from tests.concurrency import (
    DEADLINE_SECONDS,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

StricterDefault = Callable[[str, str], None]


@pytest.fixture
def consumer(transactional_db: None) -> Consumer:
    return ConsumerFactory.create()


def look(consumer: Consumer) -> object:
    assert consumer.pull() == []
    return True


def claim(consumer: Consumer) -> object:
    return consumer.claim()


@pytest.mark.parametrize("set_by", ["settings", "server"])
@pytest.mark.parametrize("work", [look, claim])
def test_what_a_worker_reads_has_no_serializable_publisher_fail(
    consumer: Consumer,
    stricter_default: StricterDefault,
    set_by: str,
    work: Callable[[Consumer], object],
):
    if work is claim:
        TaskFactory.create(
            consumer=consumer, event__stream=consumer.stream, state=TaskState.AVAILABLE
        )
    while consumer.pull():
        pass
    stricter_default(set_by, "serializable")
    name = consumer.stream.name
    with transaction.atomic():
        # Who has read what another one wrote, and writes what a third one read, is refused.
        assert Stream.objects.filter(created_at__isnull=False).exists()
        elsewhere(lambda: Stream.objects.filter(name=name).update(created_at="2020-01-01T00:00Z"))
        assert elsewhere(lambda: work(Consumer.objects.get(pk=consumer.pk)))
        published = publish("order.paid", stream=name)
    assert Event.objects.filter(pk=published.pk).exists()


def keyed() -> Event:
    return publish("order.paid", "3", stream="orders", idempotency_key="k")


def keyed_among_others() -> Event:
    first, _other = publish_many(
        [Event(subject="order.paid", body="3", idempotency_key="k"), Event(subject="order.sent")],
        stream="orders",
    )
    return first


@pytest.mark.parametrize("again", [keyed, keyed_among_others])
@pytest.mark.parametrize("is_registered", [True, False])
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_the_second_publisher_of_a_key_gets_the_event_of_the_first(
    stricter_default: StricterDefault, level: str, again: Callable[[], Event], is_registered: bool
):
    if is_registered:
        Stream.objects.register("orders")
    stricter_default("server", level)
    with transaction.atomic():
        first = keyed()
        second = begin_elsewhere(again)
        wait_until(is_waited_for)
    assert second.result() == first
    assert not second.result().created


def test_two_publishers_begin_a_stream(stricter_default: StricterDefault):
    def many() -> Any:
        return publish_many([Event(subject="a"), Event(subject="b")], stream="new")

    stricter_default("settings", "repeatable read")
    with transaction.atomic():
        many()
        second = begin_elsewhere(many)
        wait_until(is_waited_for)
    assert len(second.result()) == 2
    assert Event.objects.filter(stream__name="new").count() == 4


@pytest.mark.parametrize("fault", ["no event", "no id"])
def test_who_begins_a_stream_second_is_told_what_is_wrong_with_a_long_batch(
    stricter_default: StricterDefault, fault: str
):
    """The conflict is met before all events are checked."""
    given: list[Any] = [Event(subject="a") for _ in range(SLICE_SIZE + 1)]
    if fault == "no id":
        given[-1].id = fault
    else:
        given[-1] = fault
    stricter_default("server", "repeatable read")
    with transaction.atomic():
        publish("a", stream="new")
        second = begin_elsewhere(lambda: publish_many(given, stream="new"))
        wait_until(is_waited_for)
    with pytest.raises(InvalidEvent, match=rf"^events\[{SLICE_SIZE}\]: "):
        second.result(DEADLINE_SECONDS)
    assert Event.objects.count() == 1


def test_events_are_pruned_inside_transactions_that_see_who_reads_them(
    consumer: Consumer, stricter_default: StricterDefault
):
    publish("order.paid", stream=consumer.stream.name)
    Consumer.objects.filter(pk=consumer.pk).update(subject_includes=["nothing"])
    while Consumer.objects.get(pk=consumer.pk).pull():
        pass
    with transaction.atomic():
        assert Event.objects.count() == 1
        assert prune(timedelta(0)) == Pruned(1)
        transaction.set_rollback(True)

    stricter_default("server", "repeatable read")
    with transaction.atomic():
        assert Event.objects.count() == 1
        with pytest.raises(TransactionManagementError, match="REPEATABLE READ"):
            prune(timedelta(0))
    assert prune(timedelta(0)) == Pruned(1)


@pytest.mark.parametrize(
    "delete", [lambda event: event.delete(), lambda _: Event.objects.all().delete()]
)
def test_no_pull_makes_a_task_of_an_event_that_is_being_deleted(
    consumer: Consumer, delete: Callable[[Event], object]
):
    def pull_meanwhile(**_: Any) -> None:
        pre_delete.disconnect(pull_meanwhile, sender=Event)
        elsewhere(lambda: Consumer.objects.get(pk=consumer.pk).pull())

    event = publish("order.paid", stream=consumer.stream.name)
    pre_delete.connect(pull_meanwhile, sender=Event)
    delete(event)
    assert not Event.objects.exists()
    assert not Task.objects.exists()
    assert consumer.pull() == []


def test_no_consumer_joins_a_stream_whose_event_is_being_deleted(consumer: Consumer):
    joining: list[Future[Any]] = []

    def join_meanwhile(**_: Any) -> None:
        pre_delete.disconnect(join_meanwhile, sender=Event)
        joining.append(begin_elsewhere(join))
        wait_until(lambda: is_waited_for() or joining[0].done())

    def join() -> list[Task]:
        given = Registration(stream=consumer.stream.name, includes=[">"])
        return Consumer.objects.register("newcomer", given).pull()

    event = publish("order.paid", stream=consumer.stream.name)
    pre_delete.connect(join_meanwhile, sender=Event)
    event.delete()
    assert joining[0].result(DEADLINE_SECONDS) == []
    assert not Task.objects.exists()


@pytest.mark.parametrize("doomed", [Event, Consumer])
def test_a_deletion_may_take_its_time(consumer: Consumer, doomed: type[Event | Consumer]):
    limits: list[str] = []

    def look_at_limit(**_: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SHOW idle_in_transaction_session_timeout")
            limits.append(cursor.fetchone()[0])

    publish("order.paid", stream=consumer.stream.name)
    pre_delete.connect(look_at_limit, sender=doomed)
    try:
        doomed.objects.all().delete()
    finally:
        pre_delete.disconnect(look_at_limit, sender=doomed)
    assert limits == ["0"]


def test_events_and_consumers_are_deleted_in_one_order_of_locks(consumer: Consumer):
    event = publish("order.paid", stream=consumer.stream.name)
    with transaction.atomic():
        Consumer.objects.all().delete()
        other = begin_elsewhere(Event.objects.filter(pk=event.pk).delete)
        wait_until(is_waited_for)
        Event.objects.all().delete()
    assert other.result(DEADLINE_SECONDS) == (0, {})


@pytest.mark.parametrize("delete", [Event.delete, lambda _: Event.objects.all().delete()])
def test_no_event_is_deleted_where_who_reads_it_cannot_be_seen(
    stricter_default: StricterDefault, delete: Callable[[Event], object]
):
    event = publish("order.paid", stream="orders")
    stricter_default("server", "repeatable read")
    with transaction.atomic(), pytest.raises(TransactionManagementError, match="REPEATABLE READ"):
        delete(event)
    delete(event)
    assert not Event.objects.exists()


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
def test_no_event_is_deleted_in_the_admin_that_a_consumer_begins_to_read(
    admin_client: Client,
    stricter_default: StricterDefault,
    monkeypatch: pytest.MonkeyPatch,
    level: str,
):
    ask = EventAdmin.has_delete_permission

    def join_after(*args: Any) -> bool:
        is_allowed = ask(*args)
        elsewhere(lambda: Consumer.objects.register("newcomer", Registration("orders", [">"])))
        return is_allowed

    event = publish("order.paid", stream="orders")
    stricter_default("settings", level)
    monkeypatch.setattr(EventAdmin, "has_delete_permission", join_after)
    assert admin_client.post(page("event_delete", event.pk), {"post": "yes"}).status_code == 403
    (task,) = Consumer.objects.get(name="newcomer").pull()
    assert task.event == event


def test_no_event_is_deleted_in_the_admin_where_who_reads_it_cannot_be_seen(
    admin_client: Client, stricter_default: StricterDefault
):
    address = page("event_delete", publish("order.paid", stream="orders").pk)
    stricter_default("server", "repeatable read")
    with transaction.atomic(), pytest.raises(TransactionManagementError, match="REPEATABLE READ"):
        admin_client.post(address, {"post": "yes"})
    assert admin_client.post(address, {"post": "yes"}).status_code == 302
    assert not Event.objects.exists()


def by_autocommit() -> None:
    connection.set_autocommit(False)


def by_hand() -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")


@pytest.mark.parametrize("begin", [by_autocommit, by_hand])
@pytest.mark.parametrize("serialize", Serialize)
def test_a_claim_in_a_transaction_begun_past_atomic_does_not_end_it(
    serialize: Serialize, begin: Callable[[], None]
):
    consumer = ConsumerFactory.create(serialize=serialize.value)
    tasks = TaskFactory.create_batch(2, consumer=consumer)
    begin()
    try:
        event = publish("order.sent", stream=consumer.stream.name)
        assert consumer.claim() == tasks
    finally:
        connection.rollback()
        connection.set_autocommit(True)
    assert not Event.objects.filter(pk=event.pk).exists()
    assert consumer.claim() == tasks


@pytest.mark.parametrize("begin", [by_autocommit, by_hand])
def test_a_conflict_in_a_transaction_begun_past_atomic_is_told(begin: Callable[[], None]):
    runs: list[None] = []

    def conflict() -> None:
        runs.append(None)
        Stream.objects.create(name="orders")

    Stream.objects.register("orders")
    begin()
    try:
        with pytest.raises(IntegrityError, match="duplicate key"):
            unconflicted("default", conflict)
    finally:
        connection.rollback()
        connection.set_autocommit(True)
    assert len(runs) == 1
    assert publish("order.sent", stream="orders").created


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("verdict", ["ack", "nack", "extend"])
def test_a_verdict_outside_of_any_block_meets_no_conflict(
    consumer: Consumer, stricter_default: StricterDefault, verdict: str, level: str
):
    publish("order.paid", stream=consumer.stream.name)
    (task,) = consumer.pull()
    message = Message(task)
    end: Callable[[], object] = {
        "ack": message.ack,
        "nack": lambda: message.nack("no"),
        "extend": lambda: message.extend(timedelta(hours=1)),
    }[verdict]
    stricter_default("server", level)
    with transaction.atomic():
        Task.objects.filter(pk=task.pk).cancel(running=True)
        ended = begin_elsewhere(end)
        wait_until(is_waited_for)
    ended.result(DEADLINE_SECONDS)
    expected = {"ack": TaskState.COMPLETED, "nack": TaskState.CANCELLED}
    assert Task.objects.get().state == expected.get(verdict, TaskState.RUNNING)
