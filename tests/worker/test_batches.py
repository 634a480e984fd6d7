"""Handlers that get many messages in one call."""

import asyncio
import threading
import time
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connections
from django.db.models.functions import Now
from django.utils.timezone import now

from kanthorq_django import Discard, Fixed, Retry, Snooze, publish, publish_many, subscribe
from kanthorq_django.exceptions import ConfigurationError, LeaseLost, TaskCancelled
from kanthorq_django.message import ASKED, TIME_UP, Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.subscribers import find, sync
from kanthorq_django.testing import drain
from kanthorq_django.worker import puller
from kanthorq_django.worker.endings import HandBack, Nack, after_error, after_interrupt
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.pulling import pause, turn_watch
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.worker.working import PATIENCE, announce, forbidden, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = Fixed(delay=timedelta(0))


def publish_keys(*keys: str) -> list[Event]:
    return publish_many(
        [Event(subject="work.due", resource_key=key) for key in keys], stream="work"
    )


def test_a_batch_handler_gets_many_messages_in_one_call():
    sizes = []

    @subscribe("work.>", stream="work", consumer="batched", batch=50)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    announce(120)

    assert work_off("batched") == 120
    assert sum(sizes) == 120
    assert max(sizes) == 50
    assert Task.objects.completed().count() == 120


def test_a_batch_may_be_larger_than_the_workers_own():
    sizes = []

    @subscribe("work.>", stream="work", consumer="batched", batch=300)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    announce(300)
    work_off("batched", batch_size=10)
    assert sizes == [300]


def test_a_poison_message_sinks_its_batch_once_and_then_only_itself():
    sizes = []

    @subscribe("work.>", stream="work", consumer="batched", batch=10, retry=AT_ONCE, attempt_max=3)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))
        if any(message.event.json() == 7 for message in messages):
            raise ValueError("poison")

    announce(10)
    work_off("batched")
    assert Task.objects.completed().count() == 9
    (poison,) = Task.objects.discarded()
    assert poison.event.json() == 7
    assert poison.attempt_count == 3
    assert Counter(sizes) == {10: 1, 1: 9 + 2}


BOTH_RUNS = pytest.mark.parametrize("run", [work_off, drain])


def publish_of_one_key(count: int) -> None:
    events = [Event(subject="work.due", body=n, resource_key="k") for n in range(count)]
    publish_many(events, stream="work")


@BOTH_RUNS
@pytest.mark.parametrize(
    ("is_async", "options"),
    [
        (False, {}),
        (False, {"atomic": True}),
        (False, {"grouped": True}),
        (False, {"grouped": True, "atomic": True, "serialize": "strict"}),
        (True, {}),
        (True, {"grouped": True}),
    ],
)
def test_what_discards_a_batch_discards_the_poison_message_alone(
    run: Callable[[str], int],
    is_async: bool,
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
):
    sizes = []

    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))
        if any(message.event.json() == 3 for message in messages):
            raise Discard("no such order")

    async def ahandle(messages: list[Message]) -> None:
        handle(messages)

    subscribe("work.>", stream="work", consumer="batched", batch=5, retry=AT_ONCE, **options)(
        ahandle if is_async else handle
    )
    publish_of_one_key(5)
    with caplog.at_level("INFO", "kanthorq_django.worker"):
        assert run("batched") == 10
    assert sizes == [5, 1, 1, 1, 1, 1]
    assert Task.objects.completed().count() == 4
    (poison,) = Task.objects.discarded()
    assert (poison.event.json(), poison.attempt_count) == (3, 2)
    assert [failed["error"] for failed in poison.attempted_errors] == ["Discard: no such order"] * 2
    assert (
        caplog.text.count("is next handled alone, its batch was discarded by its handler: no") == 5
    )
    assert caplog.text.count(" was discarded by its handler: no such order") == 5 + 1


@BOTH_RUNS
@pytest.mark.parametrize("atomic", [True, False])
def test_what_discards_a_batch_that_cannot_be_tried_again_discards_all_of_it(
    run: Callable[[str], int], atomic: bool, caplog: pytest.LogCaptureFixture
):
    @subscribe("work.>", stream="work", consumer="batched", batch=5, attempt_max=1, atomic=atomic)
    def handle(messages: list[Message]) -> None:
        Entry.objects.create(event_id=messages[0].event.pk)
        raise Discard("no such order")

    announce(3)
    assert run("batched") == 3
    assert set(Task.objects.values_list("state", "attempt_count")) == {(TaskState.DISCARDED, 1)}
    assert Entry.objects.count() == (0 if atomic else 1)
    assert "handled alone" not in caplog.text


@BOTH_RUNS
def test_what_is_discarded_after_all_others_were_settled_is_meant(run: Callable[[str], int]):
    @subscribe("work.>", stream="work", consumer="batched", batch=5, retry=AT_ONCE)
    def handle(messages: list[Message]) -> None:
        for message in messages[:-1]:
            message.ack()
        raise Discard

    announce(3)
    assert run("batched") == 3
    assert Task.objects.completed().count() == 2
    assert Task.objects.discarded().get().attempt_count == 1


@BOTH_RUNS
@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize(
    ("verdict", "sizes", "attempts"),
    [(Retry(timedelta(0)), [3, 1, 1, 1], 2), (Snooze(timedelta(0)), [3, 3], 1)],
)
def test_a_batch_that_is_tried_again_comes_back_alone_and_one_that_snoozed_as_it_was(
    run: Callable[[str], int], atomic: bool, verdict: Exception, sizes: list[int], attempts: int
):
    seen: list[int] = []

    @subscribe("work.>", stream="work", consumer="batched", batch=5, atomic=atomic)
    def handle(messages: list[Message]) -> None:
        seen.append(len(messages))
        if len(seen) == 1:
            raise verdict

    announce(3)
    run("batched")
    run("batched")  # what snoozed is left to the next drain()
    assert seen == sizes
    assert set(Task.objects.values_list("state", "attempt_count")) == {
        (TaskState.COMPLETED, attempts)
    }


def test_an_atomic_batch_commits_its_writes_and_all_its_acks_together():
    @subscribe("work.>", stream="work", consumer="batched", batch=10, atomic=True, retry=AT_ONCE)
    def handle(messages: list[Message]) -> None:
        Entry.objects.bulk_create(Entry(event_id=message.event.pk) for message in messages)
        if len(messages) > 1 and messages[0].attempt == 1:
            raise ValueError("after the writes")

    events = announce(10)
    work_off("batched")
    assert sorted(Entry.objects.values_list("event_id", flat=True)) == sorted(e.pk for e in events)
    assert Task.objects.completed().count() == 10


def test_one_lost_lease_takes_back_the_whole_atomic_batch_but_no_attempts():
    lost: list[int] = []

    @subscribe("work.>", stream="work", consumer="batched", batch=10, atomic=True)
    def handle(messages: list[Message]) -> None:
        Entry.objects.bulk_create(Entry(event_id=message.event.pk) for message in messages)
        if not lost:
            lost.append(messages[3].task.pk)
            claim_elsewhere(messages[3].task.pk)

    def claim_elsewhere(pk: int) -> None:
        def claim() -> None:
            Task.objects.filter(pk=pk).update(schedule_at=Now() - timedelta(seconds=1))
            Consumer.objects.get(name="batched").claim(1)
            connections.close_all()

        thread = threading.Thread(target=claim)
        thread.start()
        thread.join()

    announce(10)
    work_off("batched")
    assert Task.objects.completed().count() == 9
    assert not Task.objects.completed().filter(attempt_count__gt=1).exists()
    assert Entry.objects.count() == 9
    assert Task.objects.running().get().pk == lost[0]


def test_each_message_of_a_batch_may_have_a_verdict_of_its_own():
    @subscribe(
        "work.>", stream="work", consumer="batched", batch=10, retry=Fixed(delay=timedelta(hours=1))
    )
    def handle(messages: list[Message]) -> None:
        for message in messages:
            if message.event.json() % 2:
                message.nack("odd")
            elif message.event.json() == 0:
                message.ack("first")

    announce(10)
    work_off("batched")
    assert Task.objects.retryable().count() == 5
    assert Task.objects.completed().count() == 5
    assert Task.objects.get(result="first").event.json() == 0


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("run", [work_off, drain])
def test_what_is_returned_after_the_verdicts_on_a_batch_changes_nothing(
    run: Callable[[str], int], atomic: bool
):
    @subscribe("work.>", stream="work", consumer="batched", batch=10, atomic=atomic)
    def handle(messages: list[Message]) -> object:
        Entry.objects.bulk_create(Entry(event_id=message.event.pk) for message in messages)
        for message in messages:
            message.ack()
        return object()

    announce(4)
    assert run("batched") == 4
    assert Task.objects.completed().count() == Entry.objects.count() == 4


@pytest.mark.parametrize("is_all_settled", [True, False])
def test_an_error_is_told_once_and_of_a_message_that_it_sinks(
    is_all_settled: bool, caplog: pytest.LogCaptureFixture
):
    @subscribe("work.>", stream="work", consumer="batched", batch=4, retry=Fixed())
    def handle(messages: list[Message]) -> None:
        for message in messages if is_all_settled else messages[:2]:
            message.ack()
        raise RuntimeError("after some")

    announce(4)
    with caplog.at_level("INFO", "kanthorq_django.worker"):
        work_off("batched")
    (told,) = [record for record in caplog.records if record.exc_info]
    assert ("raised after it was settled" in told.getMessage()) == is_all_settled
    assert caplog.text.count("handled and settled") == (3 if is_all_settled else 2)
    assert caplog.text.count("failed: RuntimeError") == (0 if is_all_settled else 2)
    assert Task.objects.completed().count() == (4 if is_all_settled else 2)


@pytest.mark.parametrize("atomic", [True, False])
def test_verdicts_before_a_failure_stand_only_outside_of_the_block(atomic: bool):
    @subscribe(
        "work.>", stream="work", consumer="batched", batch=10, atomic=atomic,
        retry=Fixed(delay=timedelta(hours=1)),
    )  # fmt: skip
    def handle(messages: list[Message]) -> None:
        messages[0].ack()
        raise ValueError("after the first")

    announce(10)
    work_off("batched")
    assert Task.objects.completed().count() == (0 if atomic else 1)
    assert Task.objects.retryable().count() == (10 if atomic else 9)


def batched(count: int, **options: Any) -> list[Flight]:
    """Let a batch of ``count`` begin, of a handler that is never called."""

    @subscribe("work.>", stream="work", consumer="batched", batch=count, **options)
    async def handle(messages: list[Message]) -> None: ...

    (consumer,) = sync(["batched"])
    announce(count)
    flights = [Flight(task, find("batched"), time.monotonic()) for task in consumer.pull(count)]
    for flight in flights:
        assert flight.start()
    return flights


@pytest.mark.parametrize("asked", [0, 1])
def test_of_a_batch_that_stops_as_one_was_asked_to_cancel_the_others_lose_no_attempt(asked: int):
    flights = batched(2)
    flights[asked].give_up(ASKED)
    endings = after_error(flights, TaskCancelled())
    assert [type(ending) for ending in endings] == [
        Nack if flight is flights[asked] else HandBack for flight in flights
    ]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_batch_is_out_of_time_once_the_first_of_it_is(*, is_late: bool):
    """As when its warden has come while it began: they are interrupted together."""
    flights = batched(2, timeout=timedelta(minutes=1))
    if is_late:
        assert flights[0].started_at is not None
        flights[0].started_at -= 61
    flights[0].give_up(TIME_UP)
    for ending in after_interrupt(CancelledError(), *flights):
        is_timeout = isinstance(ending, Nack) and "longer than its timeout" in ending.failure.error
        assert is_timeout is is_late


@pytest.mark.parametrize("error", [TaskCancelled, LeaseLost])
def test_who_stops_a_batch_that_nobody_asked_back_has_failed(error: type[Exception]):
    @subscribe("work.>", stream="work", consumer="batched", batch=5, retry=AT_ONCE, attempt_max=2)
    def handle(messages: list[Message]) -> None:
        raise error

    announce(2)
    work_off("batched")
    assert set(Task.objects.values_list("state", "attempt_count")) == {(TaskState.DISCARDED, 2)}


def test_the_error_that_sinks_a_batch_has_one_traceback(caplog: pytest.LogCaptureFixture):
    @subscribe("work.>", stream="work", consumer="batched", batch=5)
    def handle(messages: list[Message]) -> None:
        raise ValueError("of all of them")

    announce(5)
    drain("batched")
    assert caplog.text.count("failed: ValueError") == 5
    assert caplog.text.count("Traceback") == 1


def test_an_async_handler_of_batches_that_is_interrupted_by_itself_has_failed():
    @subscribe("work.>", stream="work", consumer="batched", batch=5, retry=AT_ONCE, attempt_max=2)
    async def handle(messages: list[Message]) -> None:
        raise asyncio.CancelledError

    announce(2)
    work_off("batched")
    assert set(Task.objects.values_list("state", "attempt_count")) == {(TaskState.DISCARDED, 2)}


@pytest.mark.parametrize("is_async", [False, True])
def test_strict_groups_keep_the_order_while_one_of_them_waits_for_its_retry(is_async: bool):
    failures, done = [1, 1, 1], []

    def handle(messages: list[Message]) -> None:
        bodies = [message.event.json() for message in messages]
        if 1 in bodies and failures:
            raise ValueError(f"failure {failures.pop()}")
        done.extend(bodies)

    async def ahandle(messages: list[Message]) -> None:
        handle(messages)

    subscribe(
        "work.>", stream="work", consumer="strict", batch=3, grouped=True, serialize="strict",
        retry=AT_ONCE,
    )(ahandle if is_async else handle)  # fmt: skip
    events = [Event(subject="work.due", body=n, resource_key="k") for n in range(1, 7)]
    publish_many(events, stream="work")
    work_off("strict")
    assert done == [1, 2, 3, 4, 5, 6]
    assert not failures


def test_an_async_handler_takes_batches_too():
    sizes = []

    @subscribe("work.>", stream="work", consumer="batched", batch=20)
    async def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    announce(40)
    work_off("batched")
    assert sizes == [20, 20]
    assert Task.objects.completed().count() == 40


def test_a_group_is_of_one_key_in_the_order_of_publishing_and_never_beside_itself():
    groups: list[list[object]] = []
    inside: Counter[str] = Counter()
    overlaps = []
    guard = threading.Lock()

    @subscribe("work.>", stream="work", consumer="grouped", batch=100, grouped=True)
    def handle(messages: list[Message]) -> None:
        (key,) = {message.task.resource_key for message in messages}
        with guard:
            inside[key] += 1
            overlaps.extend([key] * (inside[key] - 1))
            groups.append([message.event.pk for message in messages])
        threading.Event().wait(0.01)  # in which others could begin
        with guard:
            inside[key] -= 1

    events = publish_keys(*("abc" * 20))
    work_off("grouped", concurrency=4)
    assert overlaps == []
    for number in range(3):
        expected = [event.pk for event in events[number::3]]
        assert [pk for group in groups for pk in group if pk in set(expected)] == expected
    assert len(groups) < 60  # they came together


def test_the_rest_of_a_key_follows_a_group_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turn_watch, "TURNS_AGAIN", 60.0)

    @subscribe("work.>", stream="work", consumer="grouped", batch=2, grouped=True)
    def handle(messages: list[Message]) -> None:
        pass

    publish_keys(*["a"] * 8)
    with working("grouped"):
        wait_until(lambda: Task.objects.completed().count() == 8, PATIENCE)


def busy_key() -> tuple[threading.Event, threading.Event]:
    """Let tasks of the key "busy" wait for the first event; the second tells that one does."""
    gate, is_inside = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="keyed", serialize=True)
    def handle(message: Message) -> None:
        if message.event.resource_key == "busy":
            is_inside.set()
            gate.wait(PATIENCE)

    return gate, is_inside


def test_a_key_that_waits_for_a_handler_of_ours_delays_no_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pause, "PAUSE_FIRST", 3_600.0)
    monkeypatch.setattr(puller, "PAUSE_LONGEST", 3_600.0)
    gate, is_inside = busy_key()
    publish_keys("busy", "busy")
    with working("keyed", poll_interval=timedelta(minutes=1), listen=True) as loop:
        assert is_inside.wait(PATIENCE)
        (again,) = loop._puller._turns._waits.values()
        # A claim that came with a pull has found no turn to give, and one of its own.
        wait_until(lambda: again._wait > 2 * turn_watch.TURNS_AGAIN, PATIENCE)
        publish_keys("free")
        wait_for_state(TaskState.COMPLETED, resource_key="free")
        gate.set()


def test_a_task_that_is_resumed_waits_for_no_key_but_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turn_watch, "TURNS_AGAIN", 3_600.0)
    gate, is_inside = busy_key()
    publish("work.due", stream="work", resource_key="free", schedule_at=now() + timedelta(days=1))
    publish_keys("busy", "busy")
    with working("keyed", poll_interval=timedelta(minutes=1), listen=True) as loop:
        assert is_inside.wait(PATIENCE)
        free = Task.objects.filter(resource_key="free")
        wait_until(lambda: len(free.cancel().updated) == 1, PATIENCE)
        (again,) = loop._puller._turns._waits.values()
        wait_until(lambda: again._wait < turn_watch.TURNS_AGAIN, PATIENCE)
        free.resume()
        wait_for_state(TaskState.COMPLETED, resource_key="free")
        gate.set()


def test_a_key_that_waits_does_not_have_pulls_that_fail_tried_again_at_once():
    gate, is_inside = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="keyed", serialize=True)
    def handle(message: Message) -> None:
        is_inside.set()
        gate.wait(PATIENCE)

    publish_keys("busy", "busy")
    with working("keyed", poll_interval=timedelta(seconds=1)) as loop:
        assert is_inside.wait(PATIENCE)
        (again,) = loop._puller._turns._waits.values()
        wait_until(lambda: again._wait > 2 * turn_watch.TURNS_AGAIN, PATIENCE)
        with forbidden("resource_key = 'poison'"):
            publish_keys("poison")
            (pause,) = loop._puller._pauses.values()
            wait_until(lambda: pause.seconds > 0, PATIENCE)
        gate.set()


def test_a_group_goes_on_in_order_after_a_failure():
    seen = []

    @subscribe("work.>", stream="work", consumer="grouped", batch=100, grouped=True, retry=AT_ONCE)
    def handle(messages: list[Message]) -> None:
        seen.append([message.attempt for message in messages])
        if len(messages) == 3:
            raise ValueError("one of these")

    publish_keys("a", "a", "a")
    work_off("grouped")
    assert seen == [[1, 1, 1], [2], [2], [2]]


def test_what_has_no_key_is_in_no_group():
    """Many run side by side, and no more are leased than that."""
    end, sizes = threading.Event(), []

    @subscribe("work.>", stream="work", consumer="grouped", batch=10, grouped=True)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))
        end.wait(PATIENCE)

    announce(400)
    with working("grouped", concurrency=4, poll_interval=timedelta(milliseconds=10)):
        wait_until(lambda: sum(sizes) >= 40, PATIENCE)
        assert Task.objects.running().count() == 40
        end.set()
    assert sizes[:4] == [10] * 4


def test_failures_between_fresh_tasks_tear_no_batch():
    sizes = []

    @subscribe("work.>", stream="work", consumer="batched", batch=10)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    sync(["batched"])
    announce(40)
    Consumer.objects.get().pull(40)
    Task.objects.update(state=TaskState.AVAILABLE, attempt_count=0, schedule_at=Now())
    odd = [task.pk for task in Task.objects.all() if task.event.json() % 2]
    Task.objects.filter(pk__in=odd).update(state=TaskState.RETRYABLE, attempt_count=1)
    work_off("batched", concurrency=1)
    assert sum(sizes) == 40
    assert max(sizes) >= 5


def test_the_end_gives_back_what_waits_behind_its_group():
    begun, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="grouped", batch=10, grouped=True)
    def handle(messages: list[Message]) -> None:
        begun.set()
        end.wait(2 * PATIENCE)

    sync(["grouped"])
    publish_keys("a", "a", "a")
    Consumer.objects.get().pull(3)
    Task.objects.update(state=TaskState.RETRYABLE, attempt_count=1, schedule_at=Now())
    with working("grouped", concurrency=8, shutdown_timeout=timedelta(0)) as loop:
        assert begun.wait(PATIENCE)
        wait_until(lambda: Task.objects.running().count() == 3, PATIENCE)
        loop.stop()
        wait_until(lambda: Task.objects.running().count() == 1, PATIENCE)
        end.set()
    assert sorted(Task.objects.values_list("attempt_count", flat=True)) == [1, 1, 2]


def test_cleanup_of_a_batch_consumer_gets_one_message():
    cleaned = []

    @subscribe("work.>", stream="work", consumer="batched", batch=10, parked=True)
    def handle(messages: list[Message]) -> None: ...

    @handle.on_cancel()
    def clean(message: Message) -> None:
        cleaned.append(message.event.json())

    announce(3)
    work_off("batched")
    Task.objects.pending().cancel()
    work_off("batched")
    assert sorted(cleaned) == [0, 1, 2]


def test_drain_hands_over_batches_as_a_worker_does():
    sizes = []

    @subscribe("work.>", stream="work", consumer="batched", batch=4, atomic=True)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    announce(10)
    assert drain("batched") == 10
    assert sizes == [4, 4, 2]
    assert Task.objects.filter(state=TaskState.COMPLETED).count() == 10


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"batch": True}, {"batch": 10_001}, {"grouped": True}, {"serialize": 1.5}],
)
def test_a_wrong_batch_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        subscribe("work.>", consumer="batched", **wrong)(lambda messages: None)
