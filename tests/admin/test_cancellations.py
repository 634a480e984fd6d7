"""What a consumer's page tells of its cancellations."""

from datetime import timedelta

import pytest
from django.db.models.functions import Now
from django.test import Client

from kanthorq_django.models import Consumer, TaskState
from kanthorq_django.models.maintenance import cancellations as module
from tests.admin.pages import page, text_of
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db


def ended(consumer: Consumer, state: TaskState, *errors: str, **ago: int) -> None:
    TaskFactory.create(
        consumer=consumer,
        state=state,
        cancel_requested_at=Now() - timedelta(**(ago or {"seconds": 2})),
        cancel_attempt_count=len(errors) + 1,
        attempted_errors=[{"verb": "cancel", "error": error} for error in errors],
    )


def test_cancellations_of_the_last_day_are_told_with_what_went_wrong(viewer: Client):
    consumer = ConsumerFactory.create()
    ended(consumer, TaskState.CANCELLED, "OSError: no file 17")
    ended(consumer, TaskState.CANCELLED)
    ended(consumer, TaskState.CANCELLED)
    ended(consumer, TaskState.DISCARDED, "OSError: no file 18", "\u202e<b>", minutes=9)

    text = text_of(viewer.get(page("consumer_change", consumer.pk))).replace("\xa0", " ")

    assert "In the last 24 hours" in text
    assert "Longest 3 3 1 75% 2." in text
    assert " 9 minutes Why attempts of handlers failed" in text
    assert r"Reason Attempts OSError: no file 18 2 \u202e&lt;b&gt; 1" in text


def test_a_cancellation_that_still_goes_on_has_reasons_and_no_times(viewer: Client):
    consumer = ConsumerFactory.create()
    TaskFactory.create(
        consumer=consumer,
        state=TaskState.CANCELLING,
        cancel_attempt_count=1,
        attempted_errors=[{"verb": "cancel", "error": "E"}],
    )
    text = text_of(viewer.get(page("consumer_change", consumer.pk)))
    assert "Longest 0 0 0 — — — Why" in text
    assert "Reason Attempts E 1" in text


def test_without_cancellations_the_page_says_so(viewer: Client):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    text = text_of(viewer.get(page("consumer_change", task.consumer_id)))
    assert "Cancellations: None in the last 24 hours." in text


def test_what_was_not_counted_to_the_end_says_so(viewer: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOKED_AT_MAX", 1)
    consumer = ConsumerFactory.create()
    ended(consumer, TaskState.CANCELLED)
    ended(consumer, TaskState.CANCELLED)
    assert "Longest 1+ 1 0" in text_of(viewer.get(page("consumer_change", consumer.pk)))
