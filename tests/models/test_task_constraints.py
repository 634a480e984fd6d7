"""Rows that must never be, whoever writes them: the database refuses them."""

from typing import Any

import pytest
from django.db import IntegrityError
from django.db.models.functions import Now

from kanthorq_django.domain.states import FINAL
from kanthorq_django.models import Task, TaskState
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

OPEN = sorted(set(TaskState) - FINAL)


def refused(task: Task, constraint: str, **changes: Any) -> None:
    with pytest.raises(IntegrityError, match=constraint):
        Task.objects.filter(pk=task.pk).update(**changes)


@pytest.mark.parametrize("state", sorted(FINAL))
def test_a_final_task_has_a_moment_at_which_it_ended(state: TaskState):
    refused(TaskFactory.create(state=state), "final_iff_finalized", finalized_at=None)
    refused(TaskFactory.create(), "final_iff_finalized", state=state)


@pytest.mark.parametrize("state", OPEN)
def test_only_a_final_task_has_a_moment_at_which_it_ended(state: TaskState):
    refused(TaskFactory.create(state=state), "final_iff_finalized", finalized_at=Now())
    refused(TaskFactory.create(state=TaskState.COMPLETED), "final_iff_finalized", state=state)


@pytest.mark.parametrize("state", [4, -1, 100, -100, 32_767])
def test_no_task_is_in_a_state_that_nobody_knows(state: int):
    refused(TaskFactory.create(), "known_state", state=state)


@pytest.mark.parametrize("counter", ["attempt_count", "cancel_attempt_count"])
def test_no_counter_is_below_zero(counter: str):
    refused(TaskFactory.create(), counter, **{counter: -1})


def test_a_consumer_owes_an_event_one_task():
    task = TaskFactory.create()
    with pytest.raises(IntegrityError, match="kanthorq_task_once"):
        TaskFactory.create(consumer=task.consumer, event=task.event)
