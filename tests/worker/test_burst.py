"""Workers that end by themselves: when nothing is due, and after so many tasks."""

import threading
from datetime import timedelta

import pytest
from django.db import connection
from django.db.models.functions import Now

from kanthorq_django import Fixed, Snooze, publish, publish_many, signals, subscribe
from kanthorq_django.exceptions import PullRefused
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState, Worker
from kanthorq_django.subscribers import sync
from kanthorq_django.worker.lanes.loop_watch import LoopWatch
from tests.concurrency import begin_elsewhere, wait_until
from tests.receivers import heard_by
from tests.worker.working import PATIENCE, accept, announce, backends, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = timedelta(hours=1)


def test_a_burst_without_work_ends_at_once():
    accept("idle")

    assert work_off("idle") == 0
    assert not Worker.objects.exists()


def test_a_burst_works_until_nothing_is_due_any_more():
    @subscribe("work.>", stream="work", consumer="retries", retry=Fixed(timedelta(0)))
    def handle(message: Message) -> None:
        if message.attempt < 3:
            raise ValueError("not yet")

    announce(20)

    assert work_off("retries", concurrency=2) == 60
    assert Task.objects.completed().count() == 20


def test_a_burst_leaves_what_is_due_later():
    @subscribe("work.>", stream="work", consumer="later", retry=Fixed(HOUR))
    def handle(message: Message) -> None:
        raise Snooze(HOUR) if message.event.json() else ValueError("later")

    announce(2)

    assert work_off("later") == 2
    assert set(Task.objects.values_list("state", flat=True)) == {
        TaskState.RETRYABLE,
        TaskState.AVAILABLE,
    }


def test_a_burst_leaves_what_stands_behind_a_task_that_waits_for_its_retry():
    @subscribe("work.>", stream="work", consumer="strict", serialize="strict", retry=Fixed(HOUR))
    def handle(message: Message) -> None:
        raise ValueError("not today")

    publish_many([Event(subject="work.due", resource_key="one") for _ in range(3)], stream="work")

    assert work_off("strict") == 1
    assert Task.objects.retryable().count() == 1
    assert Task.objects.available().count() == 2


@pytest.mark.parametrize("run", range(20))
def test_a_burst_sees_what_its_last_handler_publishes(run: int):
    @subscribe("chain.>", stream="work", consumer="chain", atomic=True)
    def handle(message: Message) -> None:
        if number := message.event.json():
            publish("chain.next", number - 1, stream="work")

    publish("chain.first", 4, stream="work")

    assert work_off("chain", concurrency=1) == 5


def test_a_burst_rests_while_its_last_handler_runs():
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="long")
    def handle(message: Message) -> None:
        end.wait(PATIENCE)

    announce()
    burst = begin_elsewhere(lambda: work_off("long", poll_interval=HOUR))
    wait_until(lambda: Task.objects.running().exists(), PATIENCE)
    looks = _count_looks()
    end.set()

    assert burst.result(PATIENCE) == 1  # woken by the end of the handler, not by the poll
    assert looks <= 2


def _count_looks() -> int:
    """Count how often a resting worker looks for work within some time."""
    starts = set()
    pause = threading.Event()
    for _ in range(20):
        pause.wait(0.02)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pid, query_start FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE '%One cheap look%'"
                " AND pid <> pg_backend_pid()"
            )
            starts.update(cursor.fetchall())
    return len(starts)


def test_a_burst_with_a_consumer_of_another_cluster_does_the_rest_and_says_so():
    accept("foreign")
    accept("native")
    sync(["foreign"])
    Consumer.objects.filter(name="foreign").update(cluster_id=1)
    announce(3)

    with pytest.raises(PullRefused, match=r"'foreign'.*manage\.py kanthorq rebase"):
        work_off("foreign", "native")
    assert Task.objects.completed().filter(consumer__name="native").count() == 3


@pytest.mark.parametrize(("count", "concurrency"), [(1, 10), (7, 3), (25, 4)])
def test_max_tasks_is_exact(count: int, concurrency: int):
    handled: list[int] = []

    @subscribe("work.>", stream="work", consumer="counted", visibility_timeout=timedelta(hours=1))
    def handle(message: Message) -> None:
        handled.append(message.event.json())

    announce(50)
    with working("counted", max_tasks=count, concurrency=concurrency) as loop:
        wait_until(lambda: not Worker.objects.exists() and handled, PATIENCE)
    assert loop.handled_count == len(handled) == count
    assert Task.objects.completed().count() == count
    assert not Task.objects.running().exists()


def test_max_tasks_waits_for_tasks_to_come():
    accept("counted")

    with working("counted", max_tasks=2) as loop:
        announce(1)
        wait_until(lambda: loop.handled_count == 1, PATIENCE)
        assert Worker.objects.exists()
        announce(1)
        wait_until(lambda: not Worker.objects.exists(), PATIENCE)
    assert loop.handled_count == 2


def test_a_batch_is_no_larger_than_asked_for():
    leased: list[int] = []

    def note(sender: object, tasks: list[Task], **_: object) -> None:
        leased.append(len(tasks))

    accept("small")
    announce(20)
    with heard_by(note, signals.pulled):
        work_off("small", batch_size=3, concurrency=10)
    assert max(leased) == 3
    assert sum(leased) == 20


def test_each_puller_does_only_its_part():
    subscribe("work.>", stream="work", consumer="parts")(lambda message: message.attempt)
    (consumer,) = sync(["parts"])
    announce(3)
    retryable, stuck, _ = consumer.pull()
    past = Now() - timedelta(seconds=1)
    Task.objects.filter(pk=retryable.pk).update(state=TaskState.RETRYABLE, schedule_at=past)
    Task.objects.filter(pk=stuck.pk).update(schedule_at=past)
    announce(1, "work.new")

    def done() -> set[str]:
        names = {retryable.event_id: "retryable", stuck.event_id: "stuck"}
        return {names.get(task.event_id, "new") for task in Task.objects.completed()}

    assert work_off("parts", pullers=("retry",)) == 1
    assert done() == {"retryable"}
    assert work_off("parts", pullers=("visibility",)) == 1
    assert done() == {"retryable", "stuck"}
    assert Event.objects.count() == 4
    assert Task.objects.count() == 3  # none of them pulled
    assert work_off("parts", pullers=("primary",)) == 1
    assert done() == {"retryable", "stuck", "new"}


def test_nothing_is_left_of_a_worker_that_has_ended(monkeypatch: pytest.MonkeyPatch):
    run = LoopWatch._run

    def run_and_linger(self: LoopWatch) -> None:
        run(self)
        threading.Event().wait(0.3)  # as in the middle of a look

    monkeypatch.setattr(LoopWatch, "_run", run_and_linger)
    accept("plain")

    @subscribe("work.>", stream="work", consumer="async")
    async def handle(message: Message) -> None:
        await Task.objects.acount()

    announce(5)
    with working("plain", "async", listen=True):
        wait_until(lambda: Task.objects.completed().count() == 10, PATIENCE)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("kanthorq")]
    assert not Worker.objects.exists()
    wait_until(lambda: not backends(""), PATIENCE)
