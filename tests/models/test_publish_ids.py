"""Ids that code gives to its events: free, or refused before anything breaks."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext

from kanthorq_django import publish, publish_many
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.exceptions import InvalidEvent
from kanthorq_django.models import Event, Stream
from kanthorq_django.models.publishing import notifications
from kanthorq_django.sql import binding
from tests.announcements import let_server_keep

Publish = Callable[[dict[str, Any]], object]


def alone(given: dict[str, Any]) -> object:
    return publish_many([Event(subject="a", **given)])


def keyed(given: dict[str, Any]) -> object:
    return publish_many([Event(subject="a", idempotency_key="new", **given)])


def among_others(given: dict[str, Any]) -> object:
    return publish_many([Event(subject="b"), Event(subject="a", **given)])


def among_keyed(given: dict[str, Any]) -> object:
    return publish_many([Event(subject="b"), Event(subject="a", idempotency_key="new", **given)])


def saved(given: dict[str, Any]) -> object:
    event = Event(subject="a", stream=Stream.objects.register("default"), **given)
    event.save()
    return event


def assigned(given: dict[str, Any]) -> object:
    event = Event(subject="a")
    event.id = given["id"]
    return publish_many([event])


ways = pytest.mark.parametrize(
    "publish_with", [alone, keyed, among_others, among_keyed, saved, assigned]
)


@pytest.mark.django_db
@ways
def test_an_id_that_is_taken_is_refused_and_leaves_the_transaction_usable(publish_with: Publish):
    stored = publish("order.paid", stream="other")
    with pytest.raises(InvalidEvent, match=f"id {stored.pk} is that of an event"):
        publish_with({"id": stored.pk})
    assert publish("order.sent").created
    assert Event.objects.count() == 2


@pytest.mark.django_db(transaction=True)
@ways
def test_an_id_that_is_free_is_stored_once(publish_with: Publish):
    given = {"id": uuid7()}
    publish_with(given)
    assert Event.objects.filter(pk=given["id"]).exists()
    if publish_with in (keyed, among_keyed):
        return  # the key names it
    with pytest.raises(InvalidEvent, match="is that of an event"):
        publish_with(given)
    assert Event.objects.filter(pk=given["id"]).count() == 1


@pytest.mark.django_db
def test_the_same_event_under_the_same_id_and_key_is_the_one_that_is_stored():
    given = {"id": uuid7(), "subject": "a", "idempotency_key": "key"}
    (first,) = publish_many([Event(**given)])
    (again,) = publish_many([Event(**given)])
    assert again == first
    assert not again.created


@pytest.mark.django_db
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda event: pickle.loads(pickle.dumps(event))],  # noqa: S301
)
def test_a_copy_of_an_event_that_was_not_published_yet_has_its_id(copied: Callable[[Event], Event]):
    event = Event(subject="a")
    (twin,) = publish_many([copied(event)])
    assert twin.pk == event.pk
    with pytest.raises(InvalidEvent, match="is that of an event"):
        publish_many([copied(event)])
    assert publish("b").created


@pytest.mark.django_db
def test_only_ids_that_were_given_take_a_savepoint():
    Stream.objects.register("default")
    for events, has_savepoint in (
        ([Event(subject="a"), Event(subject="b")], False),
        ([Event(subject="a"), Event(id=uuid7(), subject="b")], True),
    ):
        with CaptureQueriesContext(connection) as queries:
            publish_many(events)
        assert any("SAVEPOINT" in query["sql"] for query in queries) is has_savepoint


@pytest.mark.django_db
@pytest.mark.parametrize("others", [[], [Event(subject="b")]])
def test_an_event_that_is_published_again_past_its_state_is_refused(others: list[Event]):
    event = publish("order.paid")
    (again,) = publish_many([Event(subject="a")])
    for stored in (event, again):
        stored._state.adding = True
        with pytest.raises(InvalidEvent, match="is that of an event"):
            publish_many([stored, *(Event(subject=other.subject) for other in others)])
    assert publish("c").created


@pytest.mark.django_db(transaction=True)
def test_events_whose_commit_got_no_answer_are_refused_if_they_were_stored(
    monkeypatch: pytest.MonkeyPatch,
):
    wrapper = connections["default"]
    commit = wrapper.commit

    def lose_the_answer() -> None:
        commit()
        raise OperationalError("no answer")

    events = [Event(subject="a"), Event(subject="b")]
    with monkeypatch.context() as patched:
        patched.setattr(wrapper, "commit", lose_the_answer)
        with pytest.raises(OperationalError, match="no answer"):
            publish_many(events)
    with transaction.atomic():
        with pytest.raises(InvalidEvent, match=r"^events\[0\]: id"):
            publish_many(events)
        assert Event.objects.count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("lone_after", "sent_by"), [(3600, "_send"), (-1, "_send_in_pipeline")])
def test_an_event_that_got_no_answer_is_refused_if_it_was_stored(
    monkeypatch: pytest.MonkeyPatch, lone_after: float, sent_by: str
):
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    let_server_keep("default")
    event, send = Event(subject="a"), getattr(binding, sent_by)

    def lose_the_answer(*given: Any) -> Any:
        send(*given)
        raise psycopg.OperationalError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(binding, sent_by, lose_the_answer)
        with pytest.raises(OperationalError, match="no answer"):
            publish_many([event])
    with transaction.atomic():
        with pytest.raises(InvalidEvent, match=r"^id"):
            publish_many([event])
        assert Event.objects.filter(pk=event.pk).count() == 1
