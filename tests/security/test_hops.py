"""Handlers that publish what they consume come to an end, where hops are counted."""

from typing import Any

import pytest
from django.db import connection, transaction
from django.utils import timezone

from kanthorq_django import apublish, publish, publish_many, subscribe
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import InvalidBody, InvalidEvent
from kanthorq_django.models import Event, Task, TaskState
from kanthorq_django.models.publishing import insertion, inspection
from kanthorq_django.models.publishing.hops import following
from kanthorq_django.testing import drain
from kanthorq_django.worker import group_commit
from tests.worker.working import PATIENCE, work_off

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def three_hops(settings) -> None:
    settings.KANTHORQ = {"HOPS_MAX": 3}


def current_transaction() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id()::text::bigint")
        return int(cursor.fetchone()[0])


def hops() -> list[Any]:
    return [event.metadata.get("hops") for event in Event.objects.order_by("pk")]


def test_a_loop_ends_with_an_error_that_names_the_limit(declared: Registry):
    @subscribe("ping", consumer="pong", stream="s", attempt_max=1)
    def again(message):
        publish("ping", stream="s", metadata={"by": "pong"})

    publish("ping", stream="s")
    assert drain("pong") == 4
    assert hops() == [None, 1, 2, 3]
    (failure,) = Task.objects.get(state=TaskState.DISCARDED).attempted_errors
    assert "4 hops" in failure["error"]
    assert "the limit is 3 (KANTHORQ['HOPS_MAX'])" in failure["error"]
    assert Event.objects.latest("pk").metadata == {"by": "pong", "hops": 3}


@pytest.mark.django_db(transaction=True)
def test_coroutines_are_counted_too(declared: Registry):
    @subscribe("ping", consumer="pong", stream="s", attempt_max=1)
    async def again(message):
        await apublish("ping", stream="s")

    publish("ping", stream="s")
    assert drain("pong") == 4
    assert hops() == [None, 1, 2, 3]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("group_commit", [1, 20])
def test_what_a_handlers_block_publishes_after_its_commit_is_counted(
    declared: Registry, settings: Any, group_commit: int
):
    settings.KANTHORQ = {"HOPS_MAX": 3, "GROUP_COMMIT": group_commit}
    left = iter(range(2 * 20))

    @subscribe("ping", consumer="pong", stream="s", attempt_max=1, atomic=True)
    def again(message):
        if next(left, None) is not None:  # or it would go on for ever where nothing is counted
            transaction.on_commit(lambda: publish("ping", stream="s"))

    publish_many([Event(subject="ping") for _ in range(2)], stream="s")
    assert work_off("pong", concurrency=1) == 8
    assert sorted(hop or 0 for hop in hops()) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.django_db(transaction=True)
def test_of_handlers_that_share_a_transaction_each_has_its_own_hops(
    declared: Registry, settings: Any, monkeypatch: pytest.MonkeyPatch
):
    settings.KANTHORQ = {"HOPS_MAX": 3, "GROUP_COMMIT": 20}
    monkeypatch.setattr(group_commit, "SHARED_SECONDS", PATIENCE)
    transactions: list[int] = []

    @subscribe("ping", consumer="pong", stream="s", attempt_max=1, atomic=True)
    def again(message):
        transactions.append(current_transaction())
        if not message.event.metadata:
            transaction.on_commit(lambda: publish("pong", stream="s"))

    pairs = 30
    publish_many(
        [Event(subject="ping", metadata=meta) for _ in range(pairs) for meta in ({"hops": 3}, {})],
        stream="s",
    )
    assert work_off("pong", concurrency=1, batch_size=2 * pairs) == 2 * pairs
    assert len(set(transactions)) < pairs
    assert [event.metadata for event in Event.objects.filter(subject="pong")] == pairs * [
        {"hops": 1}
    ]


def test_handlers_in_one_transaction_and_in_batches_are_counted(declared: Registry):
    @subscribe("a", consumer="atomic", stream="s", atomic=True)
    def to_b(message):
        publish("b", stream="s")

    @subscribe("b", consumer="batches", stream="s", batch=5)
    def to_c(messages):
        publish("c", stream="s")

    publish("a", stream="s")
    drain("atomic", "batches")
    assert hops() == [None, 1, 2]


def test_each_of_many_that_are_published_at_once_is_counted(
    declared: Registry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inspection, "SLICE_SIZE", 2)

    @subscribe("a", consumer="c", stream="s")
    def to_many(message):
        publish_many([Event(subject="b") for _ in range(5)], stream="s")

    publish("a", stream="s")
    drain("c")
    assert hops() == [None] + [1] * 5


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("slice_size", [2, 1_000])
def test_what_is_published_without_one_that_was_refused_is_counted_anew(
    declared: Registry, monkeypatch: pytest.MonkeyPatch, slice_size: int
):
    monkeypatch.setattr(inspection, "SLICE_SIZE", slice_size)
    monkeypatch.setattr(insertion, "SLICE_SIZE", slice_size)
    given = [Event(subject="b") for _ in range(5)]

    @subscribe("a", consumer="c", stream="s")
    def refused(message):
        with pytest.raises(InvalidBody):
            publish_many([*given, Event(subject="b", body={1})], stream="s")

    publish("a", stream="s")
    drain("c")
    assert publish_many(given, stream="s") == given
    assert hops() == [None] * 6


def test_what_a_batch_publishes_follows_the_furthest_of_its_events():
    batch = [Event(metadata={"hops": count}) for count in (1, 2, True)]
    with following([Event(metadata={}), *batch]):
        assert publish("b", stream="s").metadata == {"hops": 3}
    with following(batch[-1:]):
        assert publish("b", stream="s").metadata == {"hops": 1}


def test_an_event_for_later_starts_a_chain_of_its_own(declared: Registry):
    @subscribe("a", consumer="poll", stream="s")
    def later(message):
        publish("b", stream="s", schedule_at=timezone.now())

    publish("a", stream="s", metadata={"hops": 3})
    drain("poll")
    assert hops() == [3, None]


def test_what_others_publish_after_a_handler_is_not_counted(declared: Registry):
    @subscribe("a", consumer="c", stream="s", attempt_max=1)
    def fail(message):
        raise ValueError

    publish("a", stream="s")
    drain("c")
    publish("b", stream="s")
    assert hops() == [None, None]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("metadata", [{}, {"by": "a handler"}])
@pytest.mark.parametrize("count", [0, 1, inspection.SLICE_SIZE])
def test_what_is_not_stored_has_made_no_hop(count: int, metadata: dict[str, Any]):
    """Published again, and elsewhere, it would bring along a number that is not true."""
    taken = publish("a", stream="s").pk
    events = [Event(subject="a", metadata=dict(metadata)) for _ in range(count)]
    events.append(Event(id=taken, subject="a", metadata=dict(metadata)))

    with following([Event(metadata={"hops": 1})]), pytest.raises(InvalidEvent, match="is that of"):
        publish_many(events, stream="s")
    assert [event.metadata for event in events] == [metadata] * len(events)


def test_without_the_setting_metadata_is_left_alone(declared: Registry, settings):
    settings.KANTHORQ = {}

    @subscribe("a", consumer="c", stream="s")
    def to_b(message):
        publish("b", stream="s")

    publish("a", stream="s")
    drain("c")
    assert hops() == [None, None]


def test_hops_that_somebody_made_up_do_no_harm(declared: Registry):
    @subscribe("a", consumer="c", stream="s")
    def to_b(message):
        publish("b", stream="s")

    publish("a", stream="s", metadata={"hops": "many"})
    drain("c")
    assert hops() == ["many", 1]
