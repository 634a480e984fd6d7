"""What a worker fetches, how much of it, and how little it asks for when there is nothing."""

import sys
import threading
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.functions import Now
from django.dispatch import Signal
from django.utils import timezone

from kanthorq_django import Fixed, publish, publish_many, schedule, signals, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.subscribers import sync
from kanthorq_django.worker import loop as worker_loop
from kanthorq_django.worker.listener import Listener
from kanthorq_django.worker.loop import WorkerLoop
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.scheduler import Scheduler
from tests.concurrency import begin_elsewhere, elsewhere, wait_until
from tests.errors import Abort
from tests.receivers import heard_by
from tests.worker.working import (
    PATIENCE,
    accept,
    announce,
    forbidden,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

LONG = timedelta(minutes=1)
AT_ONCE = Fixed(timedelta(0))
LONG_ENOUGH = threading.Event()  # never set


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each notification lead to one look, and not to others for what comes soon after."""
    monkeypatch.setattr("kanthorq_django.worker.loop.SETTLE_LONGEST", 0.0)


@pytest.mark.usefixtures("unsettled")
def test_a_notification_wakes_a_worker_long_before_its_poll():
    accept("woken")

    with working("woken", poll_interval=LONG, listen=True):
        for count in range(1, 6):
            announce()  # the first is found when the worker begins to listen
            wait_for_state(TaskState.COMPLETED, count)


def test_what_is_published_before_a_worker_listens_is_found_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
):
    is_at_rest, rest, begin = threading.Event(), WorkerLoop._rest, Listener._subscribe

    def noted(loop: WorkerLoop, looks: Any) -> float:
        is_at_rest.set()
        return rest(loop, looks)

    def late(listener: Listener, connection: BaseDatabaseWrapper) -> bool:
        is_at_rest.wait(PATIENCE)
        elsewhere(announce)
        return begin(listener, connection)

    monkeypatch.setattr(WorkerLoop, "_rest", noted)
    monkeypatch.setattr(Listener, "_subscribe", late)
    accept("woken")
    with working("woken", poll_interval=LONG, listen=True):
        wait_for_state(TaskState.COMPLETED)


@pytest.mark.usefixtures("unsettled")
def test_a_resumed_task_wakes_a_worker_too():
    accept("woken")
    (consumer,) = sync(["woken"])
    announce()
    consumer.pull()
    Task.objects.update(state=TaskState.DISCARDED, finalized_at="2026-01-01T00:00:00Z")

    with working("woken", poll_interval=LONG, listen=True):
        announce()  # the worker listens once it has handled this
        wait_for_state(TaskState.COMPLETED)
        Task.objects.discarded().resume()
        wait_for_state(TaskState.COMPLETED, 2)


def test_a_worker_that_does_not_listen_polls():
    accept("polls")

    with working("polls", listen=False):
        announce()
        wait_for_state(TaskState.COMPLETED)


@pytest.mark.parametrize("serialize", [False, True])
def test_a_task_is_handled_when_it_is_due_whatever_the_poll_interval(*, serialize: bool):
    accept("due", serialize=serialize)
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement_timestamp() + interval '400 ms'")
        (due,) = cursor.fetchone()
    publish("work.later", stream="work", schedule_at=due, resource_key="one")

    with working("due", poll_interval=LONG):
        wait_for_state(TaskState.COMPLETED)
    task = Task.objects.get()
    assert due <= task.attempted_at < due + timedelta(seconds=5)


def test_tasks_of_one_key_follow_each_other_without_a_poll_between_them():
    accept("in-turn", serialize=True)
    publish_many([Event(subject="work.due", resource_key="one") for _ in range(20)], stream="work")

    with working("in-turn", poll_interval=LONG):
        wait_for_state(TaskState.COMPLETED, 20)


def test_a_locked_consumer_does_not_stop_others():
    accept("locked")
    accept("free")
    sync(["locked", "free"])
    announce(5)

    with transaction.atomic():
        Consumer.objects.select_for_update().get(name="locked")
        with working("locked", "free"):
            wait_for_state(TaskState.COMPLETED, 5, consumer__name="free")
            assert not Task.objects.filter(consumer__name="locked").exists()
            elsewhere(lambda: announce(5))
            wait_for_state(TaskState.COMPLETED, 10, consumer__name="free")


def test_a_refused_consumer_does_not_stop_others_and_is_told_once(caplog: Any):
    accept("foreign")
    accept("native")
    sync(["foreign"])
    Consumer.objects.filter(name="foreign").update(cluster_id=1)

    with working("foreign", "native"):
        for count in range(1, 6):
            announce()
            wait_for_state(TaskState.COMPLETED, count, consumer__name="native")
    (refusal,) = [record for record in caplog.records if "rebase" in record.message]
    assert refusal.consumer == "foreign"


def test_a_consumer_whose_statements_fail_does_not_stop_others(caplog: Any):
    caplog.set_level("INFO", "kanthorq_django.worker")
    accept("failing")
    accept("sound")
    failing, _ = sync(["failing", "sound"])

    with working("failing", "sound"):
        with forbidden(f"consumer_id = {failing.pk}"):
            for count in (1, 2):
                announce()
                wait_for_state(TaskState.COMPLETED, count, consumer__name="sound")
        wait_for_state(TaskState.COMPLETED, 2, consumer__name="failing")
    told = [record.message for record in caplog.records if "consumer failing" in record.message]
    assert len(told) == 2
    assert told[1] == "consumer failing works again"


def test_what_was_claimed_is_run_when_the_pull_after_it_fails():
    accept("half")
    (consumer,) = sync(["half"])
    announce()
    (task,) = consumer.pull()
    Task.objects.update(state=TaskState.AVAILABLE, attempt_count=0, schedule_at=Now())

    with forbidden(f"id > {task.pk}"):
        announce()
        with working("half"):
            wait_for_state(TaskState.COMPLETED)
    assert Task.objects.get().attempt_count == 1


def test_a_schedule_that_fails_does_not_stop_events(caplog: Any):
    caplog.set_level("INFO", "kanthorq_django.worker")
    accept("plain")
    schedule(
        "ticks",
        rrule="FREQ=DAILY",
        dtstart=timezone.now() + timedelta(seconds=1.5),  # rules know whole seconds only
        subject="work.tick",
        stream="work",
    )
    with working("plain"):
        with forbidden("subject = 'work.tick'", table="event"):
            wait_until(lambda: "scheduler interrupted" in caplog.text, PATIENCE)
            for count in range(1, 4):
                announce()
                wait_for_state(TaskState.COMPLETED, count)
        wait_for_state(TaskState.COMPLETED, 4)
    assert Event.objects.filter(subject="work.tick").count() == 1
    told = [record.message for record in caplog.records if "scheduler" in record.message]
    assert len(told) == 2
    assert told[1] == "scheduler works again"


def test_a_look_at_the_schedules_is_none_for_tasks(monkeypatch: pytest.MonkeyPatch):
    turns, take_a_turn = list[Scheduler](), Scheduler.turn

    def counted(scheduler: Scheduler) -> int:
        turns.append(scheduler)
        return take_a_turn(scheduler)

    monkeypatch.setattr("kanthorq_django.worker.scheduler.LOOK_EVERY", 0.02)
    monkeypatch.setattr(Scheduler, "turn", counted)
    accept("seldom")
    with working("seldom", poll_interval=LONG):
        wait_until(lambda: len(turns) > 5, PATIENCE)  # it rests after the first one
        announce()
        wait_until(lambda: len(turns) > 25, PATIENCE)
        assert not Task.objects.exists()


def test_what_a_worker_publishes_itself_it_handles_at_once():
    accept("ticking")
    start = timezone.now() + timedelta(seconds=1.5)
    schedule("ticks", rrule="FREQ=DAILY", dtstart=start, subject="work.tick", stream="work")
    with working("ticking", poll_interval=LONG):
        wait_for_state(TaskState.COMPLETED)


def leave_a_block_open() -> None:
    transaction.atomic().__enter__()


@pytest.mark.parametrize("harm", [sys.exit, leave_a_block_open])
@pytest.mark.parametrize("group_size", [1, 20])
def test_whatever_a_receiver_of_a_verdict_does_it_harms_no_task(
    harm: Callable[[], None], group_size: int, settings: Any
):
    settings.KANTHORQ = {"GROUP_COMMIT": group_size}

    def interfere(**_: object) -> None:
        if is_at_work():
            harm()

    @subscribe("work.>", stream="work", consumer="watched", atomic=group_size > 1, retry=AT_ONCE)
    def handle(message: Message) -> None:
        if message.attempt == 1 and message.event.json() % 5 == 0:
            raise ValueError

    announce(30)
    with heard_by(interfere, signals.acked, signals.nacked), working("watched", concurrency=2):
        wait_for_state(TaskState.COMPLETED, 30)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, CancelledError, Abort])
def test_a_raising_receiver_of_a_signal_harms_no_task(error: type[BaseException], atomic: bool):
    def interfere(**_: object) -> None:
        raise error

    @subscribe("work.>", stream="work", consumer="watched", atomic=atomic, retry=AT_ONCE)
    def handle(message: Message) -> None:
        if message.attempt == 1:
            raise ValueError

    told = (signals.pulled, signals.claimed, signals.acked, signals.nacked)
    with heard_by(interfere, *told), working("watched"):
        for count in (3, 6):
            announce(3)
            wait_for_state(TaskState.COMPLETED, count)


@pytest.mark.parametrize("signal", [signals.pulled, signals.claimed])
def test_a_receiver_that_leaves_a_block_open_stops_no_fetching(signal: Signal):
    accept("watched")
    with heard_by(lambda **_: leave_a_block_open(), signal), working("watched"):
        for count in (5, 10):
            announce(5)
            wait_for_state(TaskState.COMPLETED, count)


def is_at_work() -> bool:
    """Tell whether this is one of the worker's own threads, and not that which runs its loop."""
    return threading.current_thread().name.startswith("kanthorq-")


def test_slow_handlers_do_not_hoard():
    """What a worker holds is bounded by what its handlers start within about a second."""
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="slow")
    def handle(message: Message) -> None:
        end.wait(PATIENCE)

    announce(200)
    with working("slow", concurrency=3, batch_size=100):
        wait_for_state(TaskState.RUNNING, 3)
        assert Task.objects.count() == 3
        end.set()
        wait_for_state(TaskState.COMPLETED, 200)


def test_who_had_no_room_fetches_more_when_the_first_of_many_handlers_ends(
    monkeypatch: pytest.MonkeyPatch,
):
    """Nothing else has it look: others still run, and its poll and the end of leases are far."""
    monkeypatch.setattr(worker_loop, "PACE_CHECKED_EVERY", 3_600.0)
    go_on, end, far = threading.Event(), threading.Event(), timedelta(hours=1)

    @subscribe("work.>", stream="work", consumer="full", visibility_timeout=far)
    def handle(message: Message) -> None:
        (end if message.event.subject == "work.long" else go_on).wait(2 * PATIENCE)

    announce(1, "work.long")
    announce(20)
    with working("full", concurrency=2, poll_interval=far) as loop:
        wait_for_state(TaskState.RUNNING, 2)
        wait_until(lambda: loop._lanes[False]._is_refusing, PATIENCE)
        go_on.set()
        wait_for_state(TaskState.COMPLETED, 20)
        end.set()


def test_handlers_that_become_slow_give_back_what_they_cannot_start():
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="slows-down")
    def handle(message: Message) -> None:
        if message.event.subject == "work.slow":
            end.wait(PATIENCE)

    announce(400)
    announce(4, "work.slow")
    announce(400)
    with working("slows-down", concurrency=4):
        wait_until(
            lambda: Task.objects.running().filter(event__subject="work.slow").count() == 4, PATIENCE
        )
        wait_for_state(TaskState.RUNNING, 4)
        given_back = Task.objects.available().filter(attempt_count=0, lease_epoch__gt=0)
        assert given_back.exists()
        end.set()
        wait_for_state(TaskState.COMPLETED, 804)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}


def test_a_free_worker_is_not_starved_by_a_busy_one():
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="shared")
    def handle(message: Message) -> None:
        if message.event.json() < 2:
            end.wait(PATIENCE)

    announce(2)
    with working("shared", concurrency=2, batch_size=100):
        wait_for_state(TaskState.RUNNING, 2)
        publish_many(
            [Event(subject="work.due", body=number) for number in range(2, 102)], stream="work"
        )
        with working("shared", concurrency=2, batch_size=100):
            wait_for_state(TaskState.COMPLETED, 100)
        end.set()
        wait_for_state(TaskState.COMPLETED, 102)


def test_consumers_take_turns_for_scarce_room():
    """One with a long backlog does not keep another one waiting until it is through."""
    order: list[str] = []

    def note(message: Message) -> None:
        order.append(message.event.subject)

    subscribe("many.>", stream="work", consumer="many")(note)
    subscribe("few.>", stream="work", consumer="few")(note)
    announce(300, "many.due")
    announce(3, "few.due")

    assert work_off("many", "few", concurrency=1) == 303
    assert order.index("few.due") < 150


@pytest.mark.parametrize("pullers", [("primary",), ("retry", "visibility")])
def test_of_two_backlogs_each_gets_its_share(pullers: tuple[str, ...]):
    order: list[str] = []

    def noting(name: str) -> Callable[[Message], None]:
        def note(message: Message) -> None:
            order.append(name)
            LONG_ENOUGH.wait(0.1)  # that there is room for one or two, and no more

        return note

    for name in ("one", "other"):
        subscribe("work.>", stream="work", consumer=name)(noting(name))
    sync(["one", "other"])
    announce(200)
    if "primary" not in pullers:
        for consumer in Consumer.objects.all():
            consumer.pull(200)
        Task.objects.update(state=TaskState.RETRYABLE, schedule_at=Now())
    rarely = {"poll_interval": timedelta(seconds=1)}
    with working("one", "other", concurrency=1, pullers=pullers, **rarely):
        wait_until(lambda: len(order) >= 40, PATIENCE)
    assert min(Counter(order[:40])[name] for name in ("one", "other")) >= 10


def test_retries_and_new_events_of_a_consumer_each_get_their_share():
    order: list[bool] = []

    @subscribe("work.>", stream="work", consumer="both")
    def note(message: Message) -> None:
        order.append(message.attempt > 1)
        LONG_ENOUGH.wait(0.1)  # that there is room for one or two, and no more

    sync(["both"])
    announce(200)
    Consumer.objects.get().pull(200)
    Task.objects.update(state=TaskState.RETRYABLE, schedule_at=Now())
    announce(200)
    with working("both", concurrency=1):
        wait_until(lambda: len(order) >= 40, PATIENCE)
    assert min(Counter(order[:40])[is_retry] for is_retry in (True, False)) >= 10


def test_a_stop_that_comes_as_a_wake_up_is_forgotten_is_not_slept_through():
    accept("any")
    loop = WorkerLoop(
        WorkerOptions(consumers=("any",), poll_interval=timedelta(hours=1), listen=False)
    )

    class Forgetful(threading.Event):
        def clear(self) -> None:
            loop.stop()
            super().clear()

    loop._wake = Forgetful()
    running = begin_elsewhere(loop.run)
    try:
        assert running.result(PATIENCE) == 0
    finally:
        loop._wake.set()
