"""What operators may do with tasks: every verb in every state, and all that it changes."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now

from kanthorq_django.domain import states
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import FINAL
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.task import TaskQuerySet
from tests.clock import now
from tests.concurrency import elsewhere
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db

S = TaskState
VERBS = ("cancel", "resume", "release", "reset")

# What every state may carry, so that a verb that forgets a field is seen.
HISTORY: dict[str, Any] = {
    "attempt_count": 3,
    "attempted_at": datetime.fromisoformat("2020-01-01T00:00:00Z"),
    "attempted_errors": [{"error": "once"}],
    "cancel_attempt_count": 2,
    "lease_epoch": 7,
    "result": {"kept": True},
    "schedule_at": Now() - timedelta(hours=1),
}


def fields(task: Task) -> dict[str, Any]:
    return dict(Task.objects.filter(pk=task.pk).values().get())


def call(verb: str, tasks: TaskQuerySet, **options: Any) -> Outcome:
    outcome: Outcome = getattr(tasks, verb)(**options)
    return outcome


# Every state and every verb


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", TaskState)
def test_each_verb_leaves_each_state_as_the_table_of_moves_says(verb: str, state: TaskState):
    task = TaskFactory.create(state=state)
    expected = states.targets(verb, state)

    outcome = call(verb, Task.objects.filter(pk=task.pk))

    task.refresh_from_db()
    if expected:
        assert outcome == Outcome(updated=(task.event_id,))
        assert task.state == expected[0]
    else:
        assert outcome == Outcome(noop=(task.event_id,))
        assert task.state == state


@pytest.mark.parametrize(
    ("verb", "state"),
    [(verb, state) for verb in VERBS for state in TaskState if not states.targets(verb, state)],
)
def test_a_verb_that_leaves_a_task_alone_changes_none_of_its_fields(verb: str, state: TaskState):
    task = TaskFactory.create(**HISTORY | {"state": state, "cancel_requested_at": Now()})
    before = fields(task)
    call(verb, Task.objects.all())
    assert fields(task) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", TaskState)
def test_no_verb_lowers_the_epoch_and_only_final_tasks_are_finalized(verb: str, state: TaskState):
    task = TaskFactory.create(**HISTORY | {"state": state})
    call(verb, Task.objects.all())
    after = fields(task)
    assert after["lease_epoch"] >= 7
    assert (after["finalized_at"] is not None) == (after["state"] in FINAL)


# Every field


def changed_by(verb: str, task: Task, **options: Any) -> dict[str, Any]:
    """Return the fields that ``verb`` changed; a moment during the call is told as "now"."""
    before, start = fields(task), now()
    call(verb, Task.objects.filter(pk=task.pk), **options)
    after, end = fields(task), now()
    changed = {name: value for name, value in after.items() if value != before[name]}
    for name, value in changed.items():
        if isinstance(value, datetime) and start <= value <= end:
            changed[name] = "now"
    return changed


def aged(state: TaskState, **options: Any) -> Task:
    """A task in ``state`` with a history."""
    return TaskFactory.create(**HISTORY | {"state": state} | options)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("state", [S.PENDING, S.AVAILABLE, S.RETRYABLE])
def test_cancel_ends_a_waiting_task_and_its_last_lease(state: TaskState, running: bool):
    assert changed_by("cancel", aged(state), running=running) == {
        "state": S.CANCELLED,
        "finalized_at": "now",
        "lease_epoch": 8,
        "cancel_attempt_count": 0,
        "cancel_requested_at": "now",
    }


@pytest.mark.parametrize("state", [S.PENDING, S.AVAILABLE, S.RETRYABLE])
def test_cancel_makes_the_cancellation_handler_of_a_waiting_task_due_at_once(state: TaskState):
    consumer = ConsumerFactory.create(has_cancel_handler=True)
    assert changed_by("cancel", aged(state, consumer=consumer)) == {
        "state": S.CANCELLING,
        "schedule_at": "now",
        "lease_epoch": 8,
        "cancel_attempt_count": 0,
        "cancel_requested_at": "now",
    }


def test_cancel_keeps_the_moment_of_an_earlier_request():
    task = aged(S.RETRYABLE, cancel_requested_at=Now() - timedelta(hours=1))
    assert "cancel_requested_at" not in changed_by("cancel", task)


def test_cancel_asks_a_running_task_to_stop_only_if_told_to():
    task = aged(S.RUNNING)
    assert changed_by("cancel", task) == {}
    assert changed_by("cancel", task, running=True) == {"cancel_requested_at": "now"}
    assert changed_by("cancel", task, running=True) == {}


def test_cancel_reports_a_running_task_as_requested_once():
    running, waiting = TaskFactory.create(state=S.RUNNING), TaskFactory.create()
    final = TaskFactory.create(state=S.COMPLETED)
    expected = ((waiting.event_id,), (running.event_id,), (final.event_id,))
    assert Task.objects.all().cancel(running=True) == Outcome(*expected)
    again = (running.event_id, waiting.event_id, final.event_id)
    assert Task.objects.all().cancel(running=True) == Outcome(noop=again)


@pytest.mark.parametrize("state", [S.DISCARDED, S.CANCELLED])
def test_resume_makes_a_task_due_at_once_and_keeps_its_history(state: TaskState):
    assert changed_by("resume", aged(state, cancel_requested_at=Now())) == {
        "state": S.AVAILABLE,
        "schedule_at": "now",
        "finalized_at": None,
        "cancel_requested_at": None,
    }


def test_release_makes_a_parked_task_due_at_once():
    later = Now() + timedelta(hours=1)
    assert changed_by("release", aged(S.PENDING, schedule_at=later)) == {
        "state": S.AVAILABLE,
        "schedule_at": "now",
    }


@pytest.mark.parametrize("state", sorted(FINAL))
def test_reset_clears_everything_but_the_epoch(state: TaskState):
    assert changed_by("reset", aged(state, cancel_requested_at=Now())) == {
        "state": S.AVAILABLE,
        "schedule_at": "now",
        "finalized_at": None,
        "attempt_count": 0,
        "attempted_at": None,
        "attempted_errors": [],
        "cancel_attempt_count": 0,
        "cancel_requested_at": None,
        "result": None,
    }


def test_reset_makes_the_stored_result_no_value_rather_than_a_json_null():
    aged(S.COMPLETED)
    Task.objects.all().reset()
    assert Task.objects.filter(result__isnull=True).exists()


# The whole way


def test_a_task_that_was_resumed_runs_again_even_without_attempts_left():
    consumer = ConsumerFactory.create(attempt_max=3)
    aged(S.DISCARDED, consumer=consumer)
    Task.objects.all().resume()
    (task,) = consumer.claim()
    assert (task.state, task.attempt_count, task.lease_epoch) == (S.RUNNING, 4, 8)


def test_a_task_that_was_reset_starts_over():
    task = aged(S.COMPLETED)
    Task.objects.all().reset()
    (claimed,) = task.consumer.claim()
    assert (claimed.attempt_count, claimed.lease_epoch) == (1, 8)


@pytest.mark.django_db(transaction=True)
def test_a_verb_does_not_wait_for_rows_of_the_project_that_refer_to_its_task():
    task = TaskFactory.create()

    def cancel_impatiently() -> Outcome:
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '50ms'")
        return Task.objects.all().cancel()

    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT FROM kanthorq_django_task FOR KEY SHARE")  # as a foreign key does
        assert elsewhere(cancel_impatiently).updated == (task.event_id,)


@pytest.mark.django_db(transaction=True)
def test_a_verb_locks_its_tasks_and_not_their_consumer_whose_pulls_would_stop():
    TaskFactory.create()

    def lock_consumer() -> Consumer:
        with transaction.atomic():
            return Consumer.objects.select_for_update(nowait=True).get()

    with transaction.atomic():
        Task.objects.filter(consumer__name__startswith="consumer").cancel()
        elsewhere(lock_consumer)
