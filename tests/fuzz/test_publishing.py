"""Publishing from Python: what is stored reads back, or nothing is and the reason is told."""

import json
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.serializers.json import DjangoJSONEncoder
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django import apublish, apublish_many, publish, publish_many
from kanthorq_django.exceptions import ConfigurationError, InvalidEvent
from kanthorq_django.models import Event
from tests.fuzz.adversarial import (
    anything,
    examples,
    few_odd,
    json_values,
    moments,
    mostly,
    names,
    numbers,
    subjects,
    texts,
)
from tests.fuzz.doors import knocked, row_counts
from tests.fuzz.oracle import refusals

REFUSALS = (InvalidEvent, ConfigurationError)

arguments = few_odd(
    {
        "subject": "order.paid",
        "body": b"",
        "stream": "orders",
        "metadata": None,
        "resource_key": "",
        "idempotency_key": None,
        "schedule_at": None,
    },
    {
        "subject": subjects | anything,
        "body": json_values | anything,
        "stream": names | anything,
        "metadata": st.dictionaries(texts, json_values, max_size=3) | anything,
        "resource_key": names | anything,
        "idempotency_key": names | anything,
        "schedule_at": moments | anything,
    },
)
contents = arguments.map(lambda given: {k: v for k, v in given.items() if k != "stream"})


def assert_stored(published: Event, body: Any) -> None:
    """Fail unless the row holds what the publisher holds, and the body that was given."""
    stored = Event.objects.get(pk=published.pk)
    for column in ("subject", "metadata", "resource_key", "idempotency_key", "schedule_at"):
        assert getattr(stored, column) == getattr(published, column), column
    if not published.created:
        return
    if isinstance(body, str | bytes):
        assert bytes(stored.body) == (body.encode() if isinstance(body, str) else body)
    else:
        assert stored.json() == json.loads(json.dumps(body, cls=DjangoJSONEncoder))


@pytest.mark.django_db
@examples(120)
@given(given=arguments)
def test_publish_stores_what_it_was_given_or_nothing(given: dict[str, Any]):
    with knocked(*REFUSALS):
        assert_stored(publish(**given), given["body"])


@pytest.mark.django_db
@examples(40)
@given(given=arguments)
def test_apublish_does_the_same(given: dict[str, Any]):
    with knocked(*REFUSALS):
        assert_stored(async_to_sync(apublish)(**given), given["body"])


@pytest.mark.django_db(transaction=True)
@examples(60)
@given(given=arguments)
def test_publish_without_a_transaction_does_the_same(given: dict[str, Any]):
    before = row_counts()
    with refusals(*REFUSALS) as refused:
        assert_stored(publish(**given), given["body"])
    assert not refused or row_counts() == before


@pytest.mark.django_db
@pytest.mark.parametrize("publisher", [publish_many, async_to_sync(apublish_many)])
@examples(50)
@given(batch=st.lists(contents, min_size=1, max_size=5))
def test_publish_many_stores_all_of_them_or_none(publisher: Any, batch: list[dict[str, Any]]):
    events = [
        Event(**{**given, "metadata": {} if given["metadata"] is None else given["metadata"]})
        for given in batch
    ]
    bodies = [event.body for event in events]
    with knocked(*REFUSALS):
        for published, body in zip(publisher(events, stream="orders"), bodies, strict=True):
            assert_stored(published, body)


@pytest.mark.django_db
@examples(40)
@given(events=anything | st.lists(anything, max_size=3), stream=mostly("orders", names | anything))
def test_publish_many_refuses_what_are_no_events(events: Any, stream: Any):
    with knocked(*REFUSALS, TypeError) as refused:
        assert publish_many(events, stream=stream) == []
    assert refused or not list(events)


@pytest.mark.django_db
@examples(40)
@given(number=numbers)
def test_numbers_in_metadata_read_back_equal(number: Any):
    with knocked(*REFUSALS):
        published = publish("order.paid", metadata={"number": number})
        assert Event.objects.get(pk=published.pk).metadata == published.metadata
