import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from uuid import UUID

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from psycopg.pq import Format
from pytest_django import Settings

from kanthorq_django import publish, publish_many, signals
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.registration import Registration
from tests.concurrency import elsewhere
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db(transaction=True)


def register(*includes: str, **given: object) -> Consumer:
    return Consumer.objects.register(
        "reader",
        Registration("s", includes=includes or [">"], **given),  # type: ignore[arg-type]
    )


def publish_some(count: int, subject: str = "a.b", **given: object) -> list[UUID]:
    events = [Event(subject=subject, **given) for _ in range(count)]
    return [event.id for event in publish_many(events, stream="s")]


def pulled(consumer: Consumer, limit: int = 100) -> list[UUID]:
    return [task.event_id for task in consumer.pull(limit)]


def cursor_of(consumer: Consumer) -> tuple[object, ...]:
    consumer.refresh_from_db()
    return consumer.cursor, consumer.window, consumer.position_xid, consumer.position_id


def test_a_pulled_task_is_leased_to_its_puller_and_carries_its_event():
    consumer = register(visibility_timeout=timedelta(minutes=5))
    event = publish("a.b", {"n": 1}, stream="s", metadata={"m": 2}, resource_key="order-1")

    (task,) = consumer.pull()

    assert (task.state, task.attempt_count, task.lease_epoch) == (TaskState.RUNNING, 1, 1)
    assert task.resource_key == "order-1"
    assert task.attempted_at is not None
    assert task.schedule_at - task.attempted_at == timedelta(minutes=5)
    assert (task.event, task.event.json(), task.event.metadata) == (event, {"n": 1}, {"m": 2})
    assert consumer.claim() == []


@pytest.mark.parametrize("step", ["pull", "claim"])
def test_an_event_comes_with_all_its_columns(step: str):
    """A coroutine cannot have the database read one of them while it looks at it."""
    consumer, due_at = register(parked=step == "claim"), timezone.now() - timedelta(hours=1)
    published = publish(
        "a.b", {"n": 1}, stream="s", metadata={"m": 2}, resource_key="order-1",
        idempotency_key="once", schedule_at=due_at,
    )  # fmt: skip
    if step == "claim":
        assert consumer.pull() == []
        Task.objects.all().release()

    (task,) = getattr(consumer, step)()

    assert not task.event.get_deferred_fields()
    stored = Event.objects.get(pk=published.pk)
    for field in Event._meta.concrete_fields:
        assert getattr(task.event, field.attname) == getattr(stored, field.attname), field


def test_only_what_the_filters_select_becomes_a_task():
    consumer = register("order.*", "refund.>", excludes=["order.test"])
    wanted = [publish(name, stream="s").id for name in ("order.paid", "refund.a.b")]
    for subject in ("order.test", "order.paid.late", "refund", "other"):
        publish(subject, stream="s")
    publish("order.paid", stream="another")

    assert pulled(consumer) == wanted
    assert Task.objects.count() == 2


def test_each_consumer_has_a_cursor_of_its_own():
    first = register()
    second = Consumer.objects.register("second", Registration("s", includes=[">"]))
    event = publish_some(1)

    assert pulled(first) == event
    assert pulled(second) == event


def test_a_backlog_is_read_batch_by_batch_in_the_order_of_its_transactions():
    consumer = register()
    published = publish_some(4) + publish_some(1) + publish_some(5)
    batches = [pulled(consumer, limit=3) for _ in range(5)]

    assert [len(batch) for batch in batches] == [3, 3, 3, 1, 0]
    assert list(itertools.chain(*batches)) == published


def test_an_empty_page_that_closes_a_window_does_not_pass_for_idle():
    consumer = register()
    first = publish_some(3)
    assert pulled(consumer, limit=3) == first
    assert cursor_of(consumer)[1] is not None, "a full batch leaves its window open"
    second = publish_some(1)

    page = consumer.pull_page(3)

    assert (page.tasks, page.is_idle) == ([], False)
    assert cursor_of(consumer)[1:] == (None, None, None)
    assert pulled(consumer, limit=3) == second


def test_pull_reads_on_past_an_empty_page():
    consumer = register()
    publish_some(3)
    consumer.pull(3)
    second = publish_some(1)

    assert pulled(consumer, limit=3) == second


def test_what_is_published_while_a_window_is_open_comes_after_it():
    consumer = register()
    first = publish_some(5)
    assert pulled(consumer, limit=2) == first[:2]
    second = publish_some(2)

    assert pulled(consumer, limit=100) == first[2:]
    assert pulled(consumer, limit=100) == second


def test_a_consumer_that_selects_one_event_in_ten_thousand_advances_page_by_page():
    consumer = register("rare")
    publish_some(9_999)
    (first,) = publish_some(1, "rare")
    publish_some(9_999)
    (second,) = publish_some(1, "rare")
    pages = []

    def note(tasks: list[Task], **_: object) -> None:
        pages.append(tasks)

    with heard_by(note, signals.pulled):
        assert pulled(consumer) + pulled(consumer) == [first, second]
    assert 10 <= len(pages) <= 12, "2,000 events are one page"
    assert pulled(consumer) == []


def test_a_page_is_never_smaller_than_the_batch_that_was_asked_for(settings: Settings):
    settings.KANTHORQ = {"PAGE_SIZE": 2}
    consumer = register()
    published = publish_some(5)

    assert pulled(consumer, limit=5) == published


def test_a_full_room_stops_at_its_last_match_and_skips_nothing(settings: Settings):
    settings.KANTHORQ = {"PAGE_SIZE": 4}
    consumer = register("wanted")
    wanted = []
    for _ in range(6):
        publish_some(2, "other")
        wanted += publish_some(1, "wanted")

    batches = [pulled(consumer, limit=1) for _ in range(7)]

    assert batches == [[event_id] for event_id in wanted] + [[]]


def test_a_scheduled_event_becomes_a_task_that_waits():
    consumer = register()
    due = timezone.now() + timedelta(hours=1)
    publish_some(1, schedule_at=due)

    assert consumer.pull() == []

    task = Task.objects.get()
    assert (task.state, task.schedule_at, task.attempt_count) == (TaskState.AVAILABLE, due, 0)
    assert consumer.claim() == []


def test_an_event_whose_schedule_has_passed_is_leased_at_once():
    consumer = register()
    (event_id,) = publish_some(1, schedule_at=timezone.now() - timedelta(hours=1))

    assert pulled(consumer) == [event_id]


def test_a_parking_consumer_leases_nothing_before_a_release():
    consumer = register(parked=True)
    event_ids = publish_some(2)

    assert consumer.pull() == []

    assert Task.objects.pending().count() == 2
    untouched = Task.objects.filter(attempt_count=0, lease_epoch=0, attempted_at=None)
    assert untouched.filter(schedule_at__lte=Now()).count() == 2
    assert consumer.claim() == []
    consumer.release(event_ids)
    assert {task.event_id for task in consumer.claim()} == set(event_ids)


def test_tasks_that_only_wait_count_against_the_room_too():
    consumer = register(parked=True)
    publish_some(5)

    page = consumer.pull_page(2)

    assert (page.tasks, page.is_idle) == ([], False)
    assert Task.objects.count() == 2


def test_deliver_from_a_moment_leaves_out_what_was_published_before():
    publish_some(2)
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement_timestamp()")
        (moment,) = cursor.fetchone()
    late = publish_some(2)

    assert pulled(register(deliver=moment)) == late


def test_deliver_new_starts_at_the_registration():
    publish_some(2)
    consumer = register(deliver="new")
    late = publish_some(2)

    assert pulled(consumer) == late


def test_deliver_new_includes_what_its_own_transaction_publishes_after_others_have_committed():
    """The snapshot of a transaction takes its own events for read once a later one has ended."""
    with transaction.atomic():
        early = publish_some(1)
        elsewhere(lambda: publish("order.paid", stream="others"))
        consumer = register(deliver="new")
        late = publish_some(1)

    assert pulled(consumer) == early + late


def test_deliver_all_starts_at_the_beginning_however_late_it_registers():
    published = publish_some(2)

    assert pulled(register()) == published


def test_changed_filters_count_for_what_is_read_from_then_on_also_within_a_window():
    consumer = register("old")
    read = publish_some(2, "old")
    publish_some(1, "new")
    wanted = publish_some(1, "new")
    publish_some(1, "old")
    assert pulled(consumer, limit=2) == read

    register("new")

    # The first "new" event stands behind the position as well: nothing has been read past it.
    assert len(pulled(consumer)) == 2
    assert pulled(consumer) == []
    assert Task.objects.filter(event_id__in=wanted).count() == 1
    register("old")
    assert pulled(consumer) == [], "what was read past stays behind"


def test_registering_again_keeps_the_cursor_even_if_deliver_changes():
    consumer = register()
    publish_some(1)
    consumer.pull()
    before = cursor_of(consumer)

    register(deliver="new")
    register(deliver=timezone.now())

    assert cursor_of(consumer) == before
    assert Consumer.objects.get().deliver_from is None


def test_saving_a_consumer_that_was_loaded_earlier_does_not_move_its_cursor_back():
    consumer = register()
    stale = Consumer.objects.get()
    publish_some(1)
    consumer.pull()
    before = cursor_of(consumer)

    stale.attempt_max = 3
    stale.save()

    assert cursor_of(consumer) == before
    assert consumer.attempt_max == 3


def test_a_new_consumer_takes_neither_the_place_nor_the_cursor_of_another():
    consumer = register()
    publish_some(1)
    consumer.pull()
    before = cursor_of(consumer)
    new = Consumer(pk=consumer.pk, name=consumer.name, stream=consumer.stream)
    with pytest.raises(IntegrityError):
        new.save()
    new.save(force_update=True)
    assert cursor_of(consumer) == before


def test_an_idle_pull_is_one_look_that_writes_nothing():
    consumer = register()
    publish_some(1)
    consumer.pull()

    before = cursor_of(consumer)
    assert consumer.pull_page(10).is_idle
    assert cursor_of(consumer) == before
    with CaptureQueriesContext(connection) as queries:
        assert consumer.pull() == []

    (look,) = queries
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(look["sql"])
        consumer.lag()
        cursor.execute("SELECT pg_current_xact_id_if_assigned()")
        assert cursor.fetchone() == (None,)


def test_what_was_pulled_can_be_read_after_its_connection_was_closed():
    consumer = register()
    publish("a.b", {"x": 1}, stream="s", metadata={"k": "v"}, resource_key="r")
    (leased,) = consumer.pull_page(1).leased
    connection.close()
    event = leased.event
    assert (event.subject, event.json(), event.metadata) == ("a.b", {"x": 1}, {"k": "v"})
    assert (leased.task.event, leased.task.resource_key) == (event, "r")


def as_stored(instance: Event | Task) -> dict[str, object]:
    return {
        field.attname: getattr(instance, field.attname) for field in instance._meta.concrete_fields
    }


def as_it_is(execute: Callable[..., object], *given: object) -> object:
    return execute(*given)


@pytest.mark.parametrize(
    ("watched", "form"),
    [(nullcontext, Format.BINARY), (lambda: connection.execute_wrapper(as_it_is), Format.TEXT)],
    ids=["in binary", "as text"],
)
def test_what_is_leased_is_what_is_stored(
    watched: Callable[[], AbstractContextManager[None]], form: Format
):
    consumer = register()
    publish(
        "größe.\U0001f40d",
        bytes(range(256)) * 100,
        stream="s",
        metadata={"ü": [1, None, 1.5, {"\\": '"'}]},
        resource_key="ß",
        idempotency_key="é",
        schedule_at=timezone.now(),
    )
    with watched():
        (pulled,) = consumer.pull_page(10).leased
    assert as_stored(pulled.event) == as_stored(Event.objects.get())
    assert as_stored(pulled.task) == as_stored(Task.objects.get())

    history = [{"error": "ValueError: \U0001f40d", "attempt": 1}]
    due = {"state": TaskState.RETRYABLE, "schedule_at": timezone.now()}
    Task.objects.update(**due, attempted_errors=history, result={"ü": [True, 10**20]})
    with watched():
        (claimed,) = claim_due(consumer, 10, [TaskState.RETRYABLE])
    assert as_stored(claimed.event) == as_stored(Event.objects.get())
    assert as_stored(claimed.task) == as_stored(Task.objects.get())
    assert claimed.task.attempted_errors == history
    assert (pulled.lease.epoch, claimed.lease.epoch) == (1, 2)
    assert {leased._rows._result.fformat(0) for leased in (pulled, claimed)} == {form}


def test_a_window_whose_events_are_gone_is_closed_all_the_same():
    consumer = register()
    published = publish_some(1)
    assert pulled(consumer, limit=1) == published
    assert cursor_of(consumer)[1] is not None, "a full batch leaves its window open"
    Task.objects.all().delete()
    Event.objects.all().delete()

    assert pulled(consumer, limit=1) == []
    assert cursor_of(consumer)[1] is None
