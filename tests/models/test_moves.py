"""What workers do with a task in every state and situation, beside the table of moves."""

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now

from kanthorq_django.domain import states
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.states import FINAL
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db

ATTEMPT_MAX = 2
VERBS: dict[str, Callable[[Task], object]] = {
    "claim": lambda task: task.consumer.claim(),
    "ack": lambda task: lease.ack({task.lease: None}, "default"),
    "nack": lambda task: lease.nack({task.lease: lease.Failed(Failure("failed"))}, "default"),
    "hand_back": lambda task: lease.hand_back([task.lease], "default"),
}


def situations(state: TaskState) -> Iterator[Task]:
    """Yield a due task in ``state`` for all that may decide where a verb leads."""
    for has_handler, is_asked, attempts in itertools.product(
        (False, True), (False, True), (ATTEMPT_MAX - 1, ATTEMPT_MAX)
    ):
        consumer = ConsumerFactory.create(
            has_cancel_handler=has_handler, attempt_max=ATTEMPT_MAX, cancel_attempt_max=ATTEMPT_MAX
        )
        yield TaskFactory.create(
            consumer=consumer,
            state=state,
            attempt_count=attempts,
            cancel_attempt_count=attempts,
            cancel_requested_at=Now() if is_asked else None,
            schedule_at=Now() - timedelta(minutes=1),
        )


def stored(task: Task) -> dict[str, Any]:
    return dict(Task.objects.filter(pk=task.pk).values().get())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", TaskState)
def test_each_verb_of_a_worker_leads_exactly_where_the_table_of_moves_says(
    verb: str, state: TaskState
):
    reached = set()
    for task in situations(state):
        before = stored(task)
        VERBS[verb](task)
        after = stored(task)
        if not states.targets(verb, state):
            assert after == before
        reached.add(TaskState(after["state"]))
    assert reached == (set(states.targets(verb, state)) or {state})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", TaskState)
def test_no_verb_of_a_worker_lowers_an_epoch_or_a_counter_below_zero(verb: str, state: TaskState):
    for task in situations(state):
        VERBS[verb](task)
        after = stored(task)
        assert after["lease_epoch"] >= task.lease_epoch
        assert min(after["attempt_count"], after["cancel_attempt_count"]) >= 0
        assert (after["finalized_at"] is not None) == (after["state"] in FINAL)


@pytest.mark.parametrize("verb", ["ack", "nack", "hand_back"])
def test_no_lease_of_a_cancellation_ends_twice(verb: str):
    for task in situations(TaskState.CANCELLING):
        VERBS[verb](task)
        before = stored(task)
        for again in ("ack", "nack", "hand_back"):
            VERBS[again](task)
        assert stored(task) == before
