"""Verdicts and verbs on tasks: values of any type, and the transaction of the caller."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import transaction
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django.exceptions import InvalidBody, MessageError
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from tests.factories import TaskFactory
from tests.fuzz.adversarial import anything, durations, examples, json_values, numbers, texts
from tests.fuzz.doors import knocked


@pytest.fixture
def task(db: None) -> Task:
    running: Task = TaskFactory.create(state=TaskState.RUNNING)
    return running


@contextmanager
def undone() -> Iterator[None]:
    """Take back what an example wrote."""
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


@examples(60)
@given(result=json_values | anything)
def test_a_result_is_kept_as_it_is_read_back_or_refused(task: Task, result: Any):
    with undone():
        with knocked(InvalidBody) as refused:
            Message(task).ack(result)
        kept = Task.objects.get(pk=task.pk)
        assert kept.state == (TaskState.RUNNING if refused else TaskState.COMPLETED)


@examples(60)
@given(
    reason=texts | anything | st.builds(RuntimeError, texts, anything),
    delay=st.none() | durations | anything,
)
def test_any_reason_is_kept_with_a_failure(task: Task, reason: Any, delay: Any):
    with undone():
        with knocked(ValueError) as refused:
            Message(task).nack(reason, delay=delay)
        kept = Task.objects.get(pk=task.pk)
        assert kept.state == (TaskState.RUNNING if refused else TaskState.RETRYABLE)


@examples(60)
@given(duration=durations | anything)
def test_a_lease_is_extended_by_a_duration_or_not_at_all(task: Task, duration: Any):
    with undone():
        with knocked(ValueError, MessageError):
            Message(task).extend(duration)
        assert Task.objects.get(pk=task.pk).schedule_at >= task.schedule_at


@examples(60)
@given(
    ids=st.lists(st.uuids() | st.uuids().map(str) | anything, max_size=3) | anything,
    verb=st.sampled_from(("cancel", "reset")),
)
def test_verbs_of_a_consumer_take_ids_of_events_alone(task: Task, ids: Any, verb: str):
    with knocked(ValueError, TypeError):
        outcome = getattr(task.consumer, verb)(ids)
        assert not outcome.updated


@examples(60)
@given(limit=st.integers(1, 2_000_000) | numbers | anything)
def test_a_claim_takes_a_number_of_tasks_alone(task: Task, limit: Any):
    with knocked(ValueError):
        assert Consumer.objects.get(pk=task.consumer_id).claim(limit) == []
