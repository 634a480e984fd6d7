import asyncio
import contextlib
import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, IntegrityError, connection, connections, transaction
from django.db.models.functions import Now
from django.db.transaction import Atomic
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kanthorq_django import Discard, Fixed, Retry, Snooze, publish, publish_many, signals, subscribe
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.testing import BATCH_SIZE, adrain, drain
from tests.ledger.models import Entry
from tests.receivers import heard_by


def declare(**options):
    @subscribe("order.>", stream="kit", consumer="kit", **options)
    def handle(message):
        Entry.objects.create(event_id=message.event.pk)
        if message.event.subject == "order.bad":
            raise ValueError("bad order")
        if message.event.subject == "order.first":
            publish("order.second", stream="kit")

    return handle


@pytest.mark.django_db
def test_drain_handles_what_the_open_transaction_published():
    declare()
    event = publish("order.paid", stream="kit")
    publish("other.paid", stream="kit")

    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED
    assert Entry.objects.get().event_id == event.pk
    assert drain("kit") == 0


@pytest.mark.usefixtures("is_committed")
def test_a_consumer_that_starts_new_leaves_what_was_there():
    declare(deliver="new")
    publish("order.paid", stream="kit")
    assert drain("kit") == 0
    event = publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Entry.objects.get().event_id == event.pk


@pytest.mark.django_db
def test_drain_handles_what_handlers_publish():
    declare()
    publish("order.first", stream="kit")

    assert drain("kit") == 2
    assert Entry.objects.count() == 2


@pytest.mark.usefixtures("is_committed")
def test_a_handler_finds_its_task_as_it_is_stored():
    columns = [field.attname for field in Task._meta.concrete_fields]
    found = []

    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        stored = Task.objects.get(pk=message.task.pk)
        found.append([(getattr(message.task, name), getattr(stored, name)) for name in columns])

    publish("order.paid", stream="kit", resource_key="order-1")
    assert drain("kit") == 1
    assert all(given == stored for given, stored in found[0])


@pytest.mark.django_db
def test_drain_nacks_what_fails_and_leaves_it_to_wait():
    declare(atomic=True)
    publish("order.bad", stream="kit")

    assert drain("kit") == 1
    task = Task.objects.get()
    assert task.state == TaskState.RETRYABLE
    assert task.attempted_errors[0]["error"] == "ValueError: bad order"
    assert not Entry.objects.exists()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("is_committed")
def test_drain_raises_the_error_of_a_handler_where_a_test_asks_for_it(batch: int):
    @subscribe("order.>", stream="kit", consumer="kit", batch=batch)
    def handle(given):
        messages = [given] if batch == 1 else given
        if any(message.event.subject == "order.bad" for message in messages):
            raise ValueError("bad order")

    for subject in ("order.paid", "order.bad", "order.sent", "order.kept"):
        publish(subject, stream="kit")
    with pytest.raises(ValueError, match=r"^bad order$") as raised:
        drain("kit", raise_errors=True)
    assert raised.traceback[-1].name == "handle"
    failed = Task.objects.retryable()
    assert [task.attempted_errors[0]["error"] for task in failed] == [
        "ValueError: bad order"
    ] * batch
    left = Task.objects.available()
    assert {task.attempt_count for task in left} == {0}
    assert left.count() == 2
    assert drain("kit", raise_errors=True) == 2


@pytest.mark.django_db
@pytest.mark.parametrize("verdict", [Snooze(timedelta(0)), Retry(timedelta(1)), Discard("no")])
def test_what_a_handler_asks_for_by_raising_is_no_error(verdict: Exception):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        raise verdict

    publish("order.paid", stream="kit")
    assert drain("kit", raise_errors=True) == 1


@pytest.mark.django_db
def test_nor_is_what_it_says_by_nack():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        message.nack("not yet")

    publish("order.paid", stream="kit")
    assert drain("kit", raise_errors=True) == 1
    assert Task.objects.retryable().exists()


@pytest.mark.django_db
def test_a_result_that_cannot_be_kept_is_raised_too():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        return {1, 2}

    publish("order.paid", stream="kit")
    with pytest.raises(KanthorqError, match="InvalidBody: result: "):
        drain("kit", raise_errors=True)
    assert Task.objects.retryable().exists()


@pytest.mark.django_db(transaction=True)
def test_adrain_raises_the_error_of_a_coroutine():
    @subscribe("order.>", stream="kit", consumer="kit")
    async def handle(message):
        raise ValueError("bad order")

    publish("order.paid", stream="kit")
    with pytest.raises(ValueError, match=r"^bad order$"):
        async_to_sync(adrain)("kit", raise_errors=True)
    assert Task.objects.get().state == TaskState.RETRYABLE


@pytest.mark.django_db
def test_drain_counts_each_attempt():
    @subscribe("order.>", stream="kit", consumer="kit", retry=Fixed(timedelta(0)), attempt_max=3)
    def fail(message: Message) -> None:
        raise ValueError("no")

    publish("order.paid", stream="kit")
    assert drain("kit") == 3
    assert Task.objects.get().attempt_count == 3


@pytest.mark.django_db
def test_what_waits_for_its_retry_is_drained_once_a_test_makes_it_due():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        if message.attempt < 3:
            raise TimeoutError

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    for _ in range(2):
        assert Task.objects.retryable().update(schedule_at=Now()) == 1
        assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED


def break_transaction(using: str = "default") -> None:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT 1/0")


def break_copy() -> None:
    """Fail where Django sees no statement."""
    with connection.cursor() as cursor, cursor.copy("COPY ledger_entry FROM STDIN") as copy:
        copy.write("nonsense")


@pytest.mark.usefixtures("is_committed")
def test_drain_lets_a_handler_that_breaks_a_transaction_break_nothing_else():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        Entry.objects.create(event_id=message.event.pk)
        if message.event.subject == "order.bad":
            break_transaction()

    @subscribe("order.>", stream="kit", consumer="swallows")
    def swallow(message):
        with contextlib.suppress(DatabaseError):
            break_transaction()
        Entry.objects.create(event_id=message.event.pk, note="swallowed")

    publish("order.bad", stream="kit")
    publish("order.good", stream="kit")
    assert drain("kit", "swallows") == 4
    failed = Task.objects.retryable().get()
    assert failed.event.subject == "order.bad"
    assert "division by zero" in failed.attempted_errors[-1]["error"]
    assert Entry.objects.filter(note="").count() == 2  # what is not in a block lasts at once
    assert Entry.objects.filter(note="swallowed").count() == 2
    assert Task.objects.completed().count() == 3


def ack(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)
    message.ack({"kept": True})


def ack_in_a_block(message: Message) -> None:
    with transaction.atomic():
        ack(message)


def ack_in_a_block_without_a_savepoint(message: Message) -> None:
    with transaction.atomic(savepoint=False):
        ack(message)


def nack(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)
    message.nack("not yet")


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize(
    ("settle", "break_it"),
    [
        (ack, break_transaction),
        (ack, break_copy),
        (ack_in_a_block, break_transaction),
        (ack_in_a_block, break_copy),
        (ack_in_a_block_without_a_savepoint, break_transaction),
        (ack_in_a_block_without_a_savepoint, break_copy),
        (nack, break_transaction),
    ],
)
def test_drain_keeps_what_a_handler_settled_before_an_error_of_the_database(
    settle: Callable[[Message], None], break_it: Callable[[], None]
):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        settle(message)
        break_it()

    event = publish("order.paid", stream="kit")
    assert drain("kit") == 1
    task = Task.objects.get()
    if settle is nack:
        assert task.state == TaskState.RETRYABLE
        assert [failed["error"] for failed in task.attempted_errors] == ["not yet"]
    else:
        assert (task.state, task.result) == (TaskState.COMPLETED, {"kept": True})
    assert Entry.objects.get().event_id == event.pk


@pytest.mark.usefixtures("is_committed")
def test_drain_keeps_what_a_coroutine_settled_before_an_error_of_the_database():
    @subscribe("order.>", stream="kit", consumer="kit")
    async def handle(message: Message) -> None:
        await message.aack()
        await sync_to_async(break_transaction)()

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED


@pytest.mark.usefixtures("is_committed")
def test_drain_keeps_a_cancellation_that_was_settled_before_an_error_of_the_database():
    handle = declare(retry=Fixed(timedelta(hours=1)))

    @handle.on_cancel()
    def undo(message):
        message.ack()
        break_transaction()

    publish("order.bad", stream="kit")
    drain("kit")
    Task.objects.all().cancel()
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.CANCELLED


@pytest.mark.usefixtures("is_committed")
def test_drain_keeps_those_of_a_batch_that_were_settled_before_an_error_of_the_database():
    @subscribe("order.>", stream="kit", consumer="kit", batch=3)
    def handle(messages: list[Message]) -> None:
        for message in messages[:2]:
            ack_in_a_block(message)
        break_transaction()

    for _ in range(3):
        publish("order.paid", stream="kit")
    assert drain("kit") == 3
    assert Task.objects.completed().count() == Entry.objects.count() == 2
    assert "division by zero" in Task.objects.retryable().get().attempted_errors[-1]["error"]


@pytest.mark.usefixtures("is_committed")
def test_drain_takes_back_what_a_block_of_a_handler_rolls_back():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk, note="outside")
        with contextlib.suppress(DatabaseError), transaction.atomic():
            ack(message)
            break_transaction()
        with contextlib.suppress(ValueError), transaction.atomic(savepoint=False):
            ack(message)
            raise ValueError

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    task = Task.objects.get()
    assert task.state == TaskState.RETRYABLE
    assert "rolled back" in task.attempted_errors[-1]["error"]
    assert Entry.objects.get().note == "outside"


Block = Callable[[], Atomic]


def fail_in_a_block(block: Block, message: Message) -> None:
    with contextlib.suppress(ValueError), block():
        Entry.objects.create(event_id=message.event.pk, note="lost")
        raise ValueError


def fail_to_save(message: Message) -> None:
    """Fail where Django notes that a block has to be rolled back, if there is one."""
    entry = Entry.objects.create(event_id=message.event.pk, note="kept")
    with contextlib.suppress(IntegrityError):
        Entry.objects.create(pk=entry.pk, event_id=message.event.pk, note="lost")


BLOCKS: list[Block] = [
    transaction.atomic,
    functools.partial(transaction.atomic, savepoint=False),
    functools.partial(transaction.atomic, durable=True),
]


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("fail", "kept"),
    [
        *((functools.partial(fail_in_a_block, block), []) for block in BLOCKS),
        (fail_to_save, ["kept"]),
    ],
)
def test_what_failed_before_a_block_of_a_handler_does_not_fail_the_block(
    fail: Callable[[Message], None], kept: list[str], block: Block
):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        fail(message)
        with block():
            Entry.objects.create(event_id=message.event.pk, note="in the block")
            message.ack({"kept": True})

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    task = Task.objects.get()
    assert (task.state, task.result) == (TaskState.COMPLETED, {"kept": True})
    notes = Entry.objects.order_by("pk").values_list("note", flat=True)
    assert list(notes) == [*kept, "in the block"]


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_a_handler_that_fails_undoes_only_itself_whatever_failed_before(block: Block):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        fail_to_save(message)
        fail_in_a_block(block, message)
        Entry.objects.create(event_id=message.event.pk, note="after")

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED
    assert list(Entry.objects.order_by("pk").values_list("note", flat=True)) == ["kept", "after"]


@pytest.mark.usefixtures("is_committed")
def test_drain_keeps_what_was_copied_after_a_save_that_failed():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        fail_to_save(message)
        statement = "COPY ledger_entry (event_id, note) FROM STDIN"
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.write_row((message.event.pk, "copied"))

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert list(Entry.objects.order_by("pk").values_list("note", flat=True)) == ["kept", "copied"]


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("block", BLOCKS)
def test_drain_keeps_the_hooks_of_those_blocks_that_a_worker_would_commit(
    block: Block, django_capture_on_commit_callbacks: Any
):
    hooks_run: list[str] = []

    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        with block():
            transaction.on_commit(functools.partial(hooks_run.append, "first"))
        fail_to_save(message)
        with contextlib.suppress(ValueError), block():
            transaction.on_commit(functools.partial(hooks_run.append, "lost"))
            raise ValueError
        with block():
            transaction.on_commit(functools.partial(hooks_run.append, "last"))

    publish("order.paid", stream="kit")
    with django_capture_on_commit_callbacks(execute=True):
        drain("kit")
    assert hooks_run == ["first", "last"]


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("use", [transaction.savepoint_commit, transaction.savepoint_rollback])
def test_a_savepoint_outside_of_a_block_is_none(use: Callable[[Any], None]):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        outer = connection.savepoint()
        Entry.objects.create(event_id=message.event.pk, note="kept")
        with transaction.atomic():
            inner = str(connection.savepoint())
            Entry.objects.create(event_id=message.event.pk, note="lost")
            transaction.savepoint_rollback(inner)
        message.ack()
        use(outer)

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED
    assert Entry.objects.get().note == "kept"
    if connection.in_atomic_block:  # that of a test, which has savepoints of its own
        Entry.objects.all().delete()
        savepoint = str(connection.savepoint())
        Entry.objects.create(event_id=uuid7())
        transaction.savepoint_rollback(savepoint)
        assert not Entry.objects.exists()


@pytest.mark.usefixtures("is_committed")
def test_a_handler_may_use_blocks_of_psycopg():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        assert Entry.objects.count() == 0
        with connection.connection.transaction():
            Entry.objects.create(event_id=message.event.pk, note="kept")
        with contextlib.suppress(ValueError), connection.connection.transaction():
            Entry.objects.create(event_id=message.event.pk, note="lost")
            raise ValueError
        with contextlib.suppress(DatabaseError):
            break_transaction()

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED
    assert Entry.objects.get().note == "kept"


@pytest.mark.usefixtures("is_committed")
def test_what_snoozes_hides_nothing_that_is_due(monkeypatch: pytest.MonkeyPatch):
    @subscribe("order.>", stream="kit", consumer="kit", retry=Fixed(timedelta(0)), attempt_max=3)
    def handle(message: Message) -> None:
        if message.event.subject == "order.snoozed":
            raise Snooze(timedelta(0))
        if message.attempt < 3:
            raise ValueError

    monkeypatch.setattr("kanthorq_django.testing.BATCH_SIZE", 2)
    publish_many([Event(subject="order.snoozed") for _ in range(5)], stream="kit")
    publish("order.failing", stream="kit")
    drain("kit")
    assert Task.objects.completed().get().event.subject == "order.failing"
    assert list(Task.objects.available().values_list("attempt_count", flat=True)) == [0] * 5


@pytest.mark.usefixtures("is_committed")
def test_what_snoozed_is_due_again_when_a_handler_ends_the_test():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        if message.event.subject == "order.last":
            raise KeyboardInterrupt
        publish("order.last" if list_due() else "order.next", stream="kit")
        raise Snooze(timedelta(0))

    def list_due() -> bool:
        return Task.objects.filter(schedule_at__gt=Now() + timedelta(days=1)).exists()

    publish("order.first", stream="kit")
    with pytest.raises(KeyboardInterrupt):
        drain("kit")
    snoozed = Task.objects.available()
    assert snoozed.exists()
    assert not snoozed.filter(schedule_at__gt=Now()).exists()


@pytest.mark.usefixtures("is_committed")
def test_ctrl_c_while_a_verdict_is_written_ends_the_test(monkeypatch: pytest.MonkeyPatch):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        pass

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lease, "ack", interrupt)
    publish("order.paid", stream="kit")
    with pytest.raises(KeyboardInterrupt):
        drain("kit")


@pytest.mark.usefixtures("is_committed")
def test_a_handler_may_drain_what_it_publishes():
    @subscribe("order.>", stream="kit", consumer="outer")
    def handle(message: Message) -> None:
        assert drain("inner") == 1
        assert connection.savepoint() is None
        note(message)

    @subscribe("order.>", stream="kit", consumer="inner")
    def note(message: Message) -> None:
        with transaction.atomic():
            Entry.objects.create(event_id=message.event.pk)

    publish("order.paid", stream="kit")
    assert drain("outer") == 1
    assert Task.objects.completed().count() == Entry.objects.count() == 2


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("block", BLOCKS)
def test_drain_takes_back_a_block_whose_error_of_the_database_was_swallowed(block: Block):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        with block():
            Entry.objects.create(event_id=message.event.pk, note="lost")
            with contextlib.suppress(DatabaseError):
                break_transaction()
        Entry.objects.create(event_id=message.event.pk, note="kept")

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.COMPLETED
    assert Entry.objects.get().note == "kept"


@pytest.mark.django_db(databases=["default", "other"])
def test_drain_lets_a_handler_break_the_transaction_of_another_database():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        if message.event.subject == "order.bad":
            break_transaction("other")
        Entry.objects.using("other").create(event_id=message.event.pk)

    publish("order.bad", stream="kit")
    good = publish("order.good", stream="kit")
    assert drain("kit") == 2
    assert Task.objects.completed().get().event_id == good.pk
    assert Entry.objects.using("other").get().event_id == good.pk


@pytest.mark.usefixtures("is_committed")
def test_drain_lets_a_receiver_break_the_transaction_of_a_test():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None: ...

    def hear(**_: Any) -> None:
        break_transaction()

    for _ in range(2):
        publish("order.paid", stream="kit")
    with heard_by(hear, signals.acked):
        assert drain("kit") == 2
    assert Task.objects.completed().count() == 2


@pytest.mark.django_db
def test_what_stands_in_for_commits_is_not_among_the_queries_of_a_test():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        with CaptureQueriesContext(connection) as captured:
            Entry.objects.create(event_id=message.event.pk)
        assert len(captured) == 1

    publish("order.paid", stream="kit")
    drain("kit")
    assert Task.objects.get().state == TaskState.COMPLETED


@pytest.mark.django_db
def test_drain_leaves_what_is_scheduled_for_later():
    declare()
    publish("order.paid", stream="kit", schedule_at=timezone.now() + timedelta(hours=1))

    assert drain("kit") == 0
    assert Task.objects.get().state == TaskState.AVAILABLE


@pytest.mark.django_db
def test_a_cleanup_is_tested_on_what_is_scheduled_for_later():
    handle, outcomes = declare(), iter([ValueError("busy"), None])

    @handle.on_cancel()
    def undo(message):
        if error := next(outcomes):
            raise error

    publish("order.paid", stream="kit", schedule_at=timezone.now() + timedelta(hours=1))
    drain("kit")
    assert Task.objects.all().cancel().updated

    assert drain("kit") == 1
    assert drain("kit") == 0
    Task.objects.cancelling().update(schedule_at=Now())
    assert drain("kit") == 1
    assert Task.objects.get().state == TaskState.CANCELLED
    assert not Entry.objects.exists()


@pytest.mark.usefixtures("is_committed")
def test_drain_finds_what_is_due_behind_any_number_of_events_that_are_not():
    declare()

    @subscribe("order.>", stream="kit", consumer="parks", parked=True)
    def park(message: Message) -> None: ...

    later = timezone.now() + timedelta(hours=1)
    waiting = [Event(subject="order.paid", schedule_at=later) for _ in range(BATCH_SIZE)]
    publish_many(waiting, stream="kit")
    due = publish("order.paid", stream="kit")
    assert drain("kit", "parks") == 1
    assert Entry.objects.get().event_id == due.pk
    assert Task.objects.available().count() == BATCH_SIZE
    assert Task.objects.pending().count() == BATCH_SIZE + 1


AT_ONCE = timedelta(0)


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("delay", [AT_ONCE, timedelta(microseconds=1), timedelta(hours=1)])
def test_drain_leaves_what_snoozed_until_it_is_called_again(delay: timedelta):
    handled: list[str] = []

    @subscribe("order.>", stream="kit", consumer="kit", batch=2)
    def handle(messages: list[Message]) -> None:
        handled.extend(message.event.subject for message in messages)
        assert len(handled) < 9, "again and again"
        if any(message.event.subject == "order.early" for message in messages):
            publish("order.next", stream="kit")
            raise Snooze(delay)

    publish("order.early", stream="kit")
    assert drain("kit") == 2
    assert handled == ["order.early", "order.next"]
    task = Task.objects.available().get()
    assert (task.event.subject, task.attempt_count) == ("order.early", 0)
    Task.objects.available().update(schedule_at=Now())
    assert drain("kit") == 2
    assert handled == ["order.early", "order.next"] * 2


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("delay", [AT_ONCE, timedelta(microseconds=1), timedelta(hours=1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"serialize": True},
        {"serialize": "strict"},
        {"batch": 2, "grouped": True},
        {"batch": 2, "grouped": True, "serialize": "strict"},
    ],
)
def test_what_snoozed_does_not_keep_the_turn_of_its_key_from_others(
    options: dict[str, Any], delay: timedelta
):
    handled: list[list[str]] = []

    @subscribe("order.>", stream="kit", consumer="kit", **options)
    def handle(given: Message | list[Message]) -> None:
        messages = given if isinstance(given, list) else [given]
        handled.append([message.event.subject for message in messages])
        assert len(handled) < 9, "again and again"
        if "order.1" in handled[-1]:
            raise Snooze(delay)

    for number in range(1, 6):
        publish(f"order.{number}", stream="kit", resource_key="a")
    groups = [["order.1", "order.2"], ["order.3", "order.4"], ["order.5"]]
    expected = groups if "batch" in options else [[f"order.{number}"] for number in range(1, 6)]
    assert drain("kit") == 5
    assert handled == expected
    snoozed = Task.objects.available()
    assert {task.event.subject for task in snoozed} == set(expected[0])
    assert set(snoozed.values_list("attempt_count", flat=True)) == {0}

    snoozed.update(schedule_at=Now())
    assert drain("kit") == len(expected[0])
    assert handled[len(expected) :] == expected[:1]


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("serialize", [False, True])
def test_what_became_of_a_task_that_snoozed_is_not_undone(*, serialize: bool):
    @subscribe("order.>", stream="kit", consumer="kit", serialize=serialize)
    def handle(message: Message) -> None:
        if message.event.subject != "order.last":
            publish("order.last", stream="kit", resource_key="a")
            raise Snooze(AT_ONCE)
        waiting = Task.objects.filter(event__subject="order.cancelled")
        assert len(waiting.cancel().updated) == 1
        waiting = Task.objects.filter(event__subject="order.later")
        assert waiting.update(schedule_at=Now() + timedelta(hours=1)) == 1

    for subject in ("order.again", "order.cancelled", "order.later"):
        publish(subject, stream="kit", resource_key="a")
    assert drain("kit") == 6
    due = Task.objects.filter(schedule_at__lte=Now()).exclude(state=TaskState.COMPLETED)
    assert {(task.event.subject, task.state) for task in due} == {
        ("order.again", TaskState.AVAILABLE),
        ("order.cancelled", TaskState.CANCELLED),
    }
    assert Task.objects.available().filter(event__subject="order.later").count() == 1


@pytest.mark.usefixtures("is_committed")
def test_drain_leaves_a_cancellation_that_snoozed_but_not_that_of_a_handler_which_did():
    cancelled: list[Message] = []

    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message: Message) -> None:
        raise Snooze(AT_ONCE)

    @handle.on_cancel()
    def undo(message: Message) -> None:
        cancelled.append(message)
        assert len(cancelled) < 5, "again and again"
        raise Snooze(AT_ONCE)

    @subscribe("order.>", stream="kit", consumer="cancels")
    def cancel(message: Message) -> None:
        Task.objects.available().cancel()

    publish("order.paid", stream="kit")
    assert drain("kit", "cancels") == 3
    assert Task.objects.cancelling().get().cancel_attempt_count == 0
    assert len(cancelled) == 1
    assert drain("kit") == 1
    assert len(cancelled) == 2


@pytest.fixture
def seen(db):
    """What a coroutine has handled, of an event that waits for it."""
    handled = []

    @subscribe("order.>", stream="kit", consumer="kit")
    async def handle(message):
        handled.append(message.event.subject)

    publish("order.paid", stream="kit")
    return handled


def test_drain_runs_coroutines(seen):
    assert drain("kit") == 1
    assert seen == ["order.paid"]


def test_a_coroutine_drains_by_its_twin_and_is_told_so(seen):
    async def check():
        with pytest.raises(SynchronousOnlyOperation, match=r"use `await adrain\(…\)`"):
            drain("kit")
        return await adrain("kit")

    assert async_to_sync(check)() == 1
    assert seen == ["order.paid"]


@pytest.mark.django_db
def test_drain_says_how_to_name_consumers():
    with pytest.raises(TypeError, match=r"names of consumers one by one, not \['kit'\]"):
        drain(["kit"])  # type: ignore[arg-type]


@pytest.mark.django_db
def test_drain_sees_an_ack_inside_the_handlers_own_block(caplog: pytest.LogCaptureFixture):
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        with transaction.atomic():
            Entry.objects.create(event_id=message.event.pk)
            message.ack({"kept": True})

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    task = Task.objects.get()
    assert task.state == TaskState.COMPLETED
    assert task.result == {"kept": True}
    assert "rolled back" not in caplog.text


@pytest.mark.django_db(transaction=True)
def test_drain_reads_committed_events_as_a_worker_does():
    declare()
    publish("order.paid", stream="kit")

    assert drain("kit") == 1
    assert drain("kit") == 0
    assert Task.objects.get().state == TaskState.COMPLETED


@pytest.mark.django_db
@pytest.mark.parametrize("options", [{"serialize": True}, {"batch": 5, "grouped": True}])
def test_drain_handles_what_is_serialized_by_key(options):
    seen = []

    @subscribe("order.>", stream="kit", consumer="kit", **options)
    def handle(given):
        seen.extend(given if isinstance(given, list) else [given])

    for _ in range(3):
        publish("order.paid", stream="kit", resource_key="order-17")
    assert drain("kit") == len(seen) == 3
    assert Task.objects.completed().count() == 3


@pytest.mark.django_db(databases=["default", "other"])
def test_drain_refuses_an_ack_that_only_another_databases_block_would_cover():
    """The test's own blocks, in both databases, cover nothing."""

    @subscribe("work.>", stream="work", consumer="crosses")
    def handle(message: Message) -> None:
        with transaction.atomic(using="other"):
            message.ack()

    publish("work.due", stream="work")
    drain("crosses")
    task = Task.objects.get()
    assert task.state == TaskState.RETRYABLE
    assert "CrossDatabaseAck" in task.attempted_errors[-1]["error"]


@pytest.mark.usefixtures("is_committed")
def test_drain_sends_the_signals_that_a_worker_would():
    heard: list[list[Task]] = []

    def hear(tasks: list[Task], **_: Any) -> None:
        heard.append(tasks)

    @subscribe("work.>", stream="work", consumer="heard")
    def handle(message: Message) -> None: ...

    publish("work.due", stream="work")
    with heard_by(hear, signals.pulled):
        drain("heard")
    assert [tasks for tasks in heard if tasks] == [[Task.objects.get()]]


@pytest.mark.django_db
def test_drain_nacks_a_coroutine_whose_own_task_was_cancelled():
    @subscribe("work.>", stream="work", consumer="gives-up")
    async def handle(message: Message) -> None:
        inner = asyncio.ensure_future(asyncio.sleep(10))
        await asyncio.sleep(0)
        inner.cancel()
        await inner

    publish("work.due", stream="work")
    assert drain("gives-up") == 1
    task = Task.objects.get()
    assert task.state == TaskState.RETRYABLE
    assert "CancelledError" in task.attempted_errors[-1]["error"]


@pytest.mark.django_db
def test_drain_handles_an_event_once_even_if_its_task_is_deleted():
    handled = []

    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        handled.append(message.event.pk)
        assert len(handled) < 5, "again and again"
        message.task.delete()

    events = [publish("order.paid", stream="kit") for _ in range(2)]
    assert drain("kit") == 2
    assert handled == [event.pk for event in events]


@pytest.mark.usefixtures("is_committed")
@pytest.mark.parametrize("serialize", [True, False])
def test_drain_nacks_a_task_whose_event_was_deleted_and_handles_the_others(*, serialize: bool):
    handled = []

    @subscribe("order.>", stream="kit", consumer="kit", serialize=serialize)
    def handle(message):
        handled.append(message.event.pk)

    due_at = timezone.now() + timedelta(hours=1)
    events = [
        publish("order.paid", stream="kit", resource_key=key, schedule_at=due_at) for key in "abc"
    ]
    assert drain("kit") == 0
    Task.objects.update(schedule_at=Now())
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM kanthorq_django_event WHERE id = %s", [events[0].pk])

    assert drain("kit") == 3
    assert handled == [event.pk for event in events[1:]]
    assert Task.objects.completed().count() == 2
    (failed,) = Task.objects.retryable()
    assert failed.event_id == events[0].pk
    assert "DoesNotExist" in failed.attempted_errors[-1]["error"]


@pytest.mark.django_db
def test_drain_ends_when_the_test_is_interrupted():
    @subscribe("order.>", stream="kit", consumer="kit")
    def handle(message):
        raise KeyboardInterrupt

    publish("order.paid", stream="kit")
    with pytest.raises(KeyboardInterrupt):
        drain("kit")


@pytest.mark.django_db
def test_drain_ends_when_the_test_is_interrupted_after_the_handler():
    class Interrupted(Fixed):
        def next_delay(self, attempt, *, chance=None):
            raise KeyboardInterrupt

    @subscribe("order.>", stream="kit", consumer="kit", retry=Interrupted())
    def handle(message):
        raise ValueError("bad order")

    publish("order.paid", stream="kit")
    with pytest.raises(KeyboardInterrupt):
        drain("kit")


@pytest.mark.django_db
def test_drain_sees_an_ack_inside_a_block_of_a_coroutine(caplog: pytest.LogCaptureFixture):
    @subscribe("order.>", stream="kit", consumer="kit")
    async def handle(message):
        @sync_to_async
        def book() -> None:
            with transaction.atomic():
                Entry.objects.create(event_id=message.event.pk)
                message.ack({"kept": True})

        await book()

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.get(state=TaskState.COMPLETED).result == {"kept": True}
    assert [each for each in caplog.records if each.levelname != "INFO"] == []


@pytest.mark.django_db(transaction=True)
def test_drain_sees_a_coroutines_ack_inside_a_block_of_the_test(caplog: pytest.LogCaptureFixture):
    @subscribe("order.>", stream="kit", consumer="kit")
    async def handle(message):
        await message.aack()

    with transaction.atomic():
        publish("order.paid", stream="kit")
        assert drain("kit") == 1
    assert Task.objects.completed().count() == 1
    assert [each for each in caplog.records if each.levelname != "INFO"] == []


@pytest.mark.django_db
def test_a_handler_that_closes_its_connections_leaves_the_test_its_own():
    @subscribe("order.>", stream="kit", consumer="plain")
    def handle(message):
        Entry.objects.create(event_id=message.event.pk)
        connections.close_all()

    @subscribe("order.>", stream="kit", consumer="coroutine")
    async def count(message):
        async with ThreadSensitiveContext():
            try:
                return await Entry.objects.acount()
            finally:
                await sync_to_async(connections.close_all)()

    publish("order.paid", stream="kit")
    assert drain("plain") == drain("coroutine") == 1
    assert list(Task.objects.order_by("pk").values_list("result", flat=True)) == [None, 1]


@pytest.mark.django_db
def test_an_atomic_handler_that_closes_its_connection_fails_as_in_a_worker():
    @subscribe("order.>", stream="kit", consumer="kit", atomic=True)
    def handle(message):
        Entry.objects.create(event_id=message.event.pk)
        connections.close_all()

    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert Task.objects.retryable().count() == 1
    assert not Entry.objects.exists()
