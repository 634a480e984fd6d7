"""A consumer that begins or ceases to serialize while somebody moves its tasks back."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction

from kanthorq_django import publish_many
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.batch import move_batch
from kanthorq_django.models.registration import Registration
from kanthorq_django.models.task import TaskQuerySet
from tests.concurrency import DEADLINE_SECONDS, begin_elsewhere, is_waited_for, wait_until

pytestmark = pytest.mark.django_db(transaction=True)


def register(serialize: str) -> Consumer:
    return Consumer.objects.register("turns", Registration("turns", [">"], serialize=serialize))


def save(serialize: str) -> Consumer:
    consumer = Consumer.objects.get(name="turns")
    consumer.serialize = serialize
    consumer.save()
    return consumer


def update(serialize: str) -> Consumer:
    Consumer.objects.exclude(serialize=serialize).update(serialize=serialize)
    return Consumer.objects.get(name="turns")


def two_of_one_key(consumer: Consumer) -> None:
    events = [Event(subject="a.b", resource_key="k") for _ in range(2)]
    publish_many(events, stream=consumer.stream.name)
    for task in consumer.pull():
        Message(task).nack("later", delay=timedelta(0))
    for task in consumer.claim():  # one of a key at a time
        Message(task).nack("later", delay=timedelta(0))


@pytest.mark.parametrize("change", [register, save, update])
@pytest.mark.parametrize(("before", "after", "at_a_time"), [("on", "", 2), ("", "on", 1)])
@pytest.mark.parametrize("verb", ["resume", "reset"])
def test_tasks_that_are_moved_back_meanwhile_follow_the_new_rule(
    verb: str, before: str, after: str, at_a_time: int, change: Callable[[str], Consumer]
):
    two_of_one_key(register(before))
    Task.objects.all().cancel()
    with transaction.atomic():
        getattr(Task.objects.all(), verb)()
        changed = begin_elsewhere(lambda: change(after))
        wait_until(is_waited_for)
    assert len(changed.result().claim()) == at_a_time


@pytest.mark.parametrize(("before", "after", "at_a_time"), [("on", "", 2), ("", "on", 1)])
def test_tasks_that_are_moved_back_during_a_change_wait_for_it(
    before: str, after: str, at_a_time: int
):
    two_of_one_key(register(before))
    Task.objects.all().cancel()
    with transaction.atomic():
        consumer = register(after)
        resumed = begin_elsewhere(lambda: Task.objects.all().resume())
        wait_until(is_waited_for)
    assert len(resumed.result().updated) == 2
    assert len(consumer.claim()) == at_a_time


@pytest.mark.parametrize("verb", ["resume", "reset"])
def test_a_change_waits_for_a_batch_of_an_operator_and_does_not_deadlock_with_it(verb: str):
    two_of_one_key(register(""))
    pks = sorted(Task.objects.values_list("pk", flat=True))
    Task.objects.filter(pk=pks[0]).cancel()
    changes: list[Future[Consumer]] = []

    def move(tasks: TaskQuerySet) -> Outcome:
        changes.append(begin_elsewhere(lambda: register("on")))
        wait_until(is_waited_for)
        outcome: Outcome = getattr(tasks, verb)()
        return outcome

    with transaction.atomic():
        told = move_batch(verb, move, Task.objects.all(), pks, running=False)
    assert [each.word for each in told] == ["updated", "noop"]
    assert len(changes[0].result(DEADLINE_SECONDS).claim()) == 1


@pytest.mark.parametrize("change", [register, save, update])
@pytest.mark.parametrize(("before", "after", "at_a_time"), [("on", "", 2), ("", "on", 1)])
def test_tasks_that_wait_follow_the_new_rule(
    before: str, after: str, at_a_time: int, change: Callable[[str], Consumer]
):
    two_of_one_key(register(before))
    assert len(change(after).claim()) == at_a_time


def test_a_change_locks_the_tasks_that_wait_in_the_order_of_verbs():
    two_of_one_key(register(""))
    first, second = Task.objects.order_by("pk")
    # What an update writes lies behind the other one, where the change might come to it last.
    Task.objects.filter(pk=first.pk).update(attempt_count=2)
    with transaction.atomic():
        assert Task.objects.select_for_update().get(pk=first.pk)
        changed = begin_elsewhere(lambda: register("on"))
        wait_until(is_waited_for)
        assert Task.objects.select_for_update(nowait=True).get(pk=second.pk)
    assert len(changed.result(DEADLINE_SECONDS).claim()) == 1


def test_a_change_waits_for_no_task_that_has_ended():
    two_of_one_key(register(""))
    Task.objects.all().cancel()
    with transaction.atomic():
        assert len(Task.objects.select_for_update()) == 2
        assert begin_elsewhere(lambda: register("on")).result(DEADLINE_SECONDS).serialize == "on"


def test_what_is_saved_over_a_change_that_is_not_committed_yet_is_a_change_back():
    two_of_one_key(register("on"))
    with transaction.atomic():
        register("")
        saved = begin_elsewhere(lambda: save("on"))
        wait_until(is_waited_for)
    assert len(saved.result().claim()) == 1


def test_what_comes_to_be_chosen_while_others_are_updated_is_not_updated_without_its_tasks():
    consumer = register("")
    two_of_one_key(consumer)
    Consumer.objects.update(parked=True)
    Consumer.objects.register("other", Registration("turns", [">"]))

    def choose(execute: Callable[..., Any], statement: str, *rest: Any) -> Any:
        if statement.startswith("UPDATE"):
            chosen = Consumer.objects.filter(pk=consumer.pk)
            begin_elsewhere(lambda: chosen.update(parked=False)).result(DEADLINE_SECONDS)
        return execute(statement, *rest)

    with connection.execute_wrapper(choose):
        assert Consumer.objects.filter(parked=False).update(serialize="on") == 1
    consumer.refresh_from_db()
    assert (consumer.parked, consumer.serialize, len(consumer.claim())) == (False, "", 2)


def test_pulls_and_claims_wait_for_nobody_who_moves_tasks_back():
    consumer = register("on")
    two_of_one_key(consumer)
    Task.objects.all().cancel()
    publish_many([Event(subject="a.b", resource_key="other")], stream="turns")

    def work() -> list[Task]:
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '1ms'")
        return consumer.pull() + consumer.claim()

    with transaction.atomic():
        Task.objects.all().resume()
        pulled: Future[list[Task]] = begin_elsewhere(work)
        assert [task.resource_key for task in pulled.result(30)] == ["other"]
    assert Task.objects.filter(state=TaskState.AVAILABLE).count() == 2
