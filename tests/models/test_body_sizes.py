"""A pull or a claim leases no more than fits into memory, at least one task, and skips nothing."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from django.db import connection
from django.db.models.functions import Now
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pytest_django import Settings

from kanthorq_django import publish_many
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX, Leased
from kanthorq_django.models.delivery.turns import Serialize
from kanthorq_django.models.registration import Registration
from tests.announcements import raw_connection

pytestmark = pytest.mark.django_db(transaction=True)

SIZE_MAX = 100
SIZES = st.lists(st.sampled_from([0, 1, 40, 60, 100, 101, 3_000]), max_size=12)
ANY_SIZES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def register(**given: object) -> Consumer:
    return Consumer.objects.register(
        "reader",
        Registration("s", includes=["wanted"], **given),  # type: ignore[arg-type]
    )


def publish_sizes(*sizes: int, subject: str = "wanted", key: str = "") -> list[UUID]:
    events = [Event(subject=subject, body=b"x" * size, resource_key=key) for size in sizes]
    return [event.id for event in publish_many(events, stream="s")]


def pulled(consumer: Consumer, limit: int = 100, size_max: int = SIZE_MAX) -> list[UUID]:
    return events_of(consumer.pull_page(limit, size_max).leased)


def claimed(consumer: Consumer, limit: int = 100, size_max: int = SIZE_MAX) -> list[UUID]:
    return events_of(claim_due(consumer, limit, CLAIMABLE, size_max=size_max))


def events_of(found: list[Leased]) -> list[UUID]:
    return [leased.event_id for leased in found]


def cut(sizes: list[int], limit: int) -> list[int]:
    """Return how many of ``sizes`` come in each answer."""
    counts, filled = [0], 0
    for size in sizes:
        if counts[-1] and (counts[-1] == limit or filled + size > max(SIZE_MAX, size)):
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return counts


def test_what_is_cut_is_cut_where_it_becomes_too_much():
    assert cut([60, 40, 1, 100, 101, 0, 0, 101], limit=100) == [2, 1, 1, 1, 3]


@ANY_SIZES
@example([60, 40, 1, 100, 101, 0, 0, 101], 100, 0)
@given(SIZES, st.sampled_from([1, 2, 3, 100]), st.integers(0, 2))
def test_pages_follow_each_other_wherever_their_bodies_end_them(
    sizes: list[int], limit: int, others: int
):
    Consumer.objects.all().delete()
    consumer = register(deliver="new")
    published = []
    for size in sizes:
        published += publish_sizes(size)
        publish_sizes(*[3_000] * others, subject="other")
    pages = []
    while not (page := consumer.pull_page(limit, SIZE_MAX)).is_idle:
        pages.append(events_of(page.leased))

    assert [event for page in pages for event in page] == published
    assert [len(page) for page in pages if page] == [n for n in cut(sizes, limit) if n]


def test_late_events_are_cut_too_and_the_fresh_ones_come_after_them():
    consumer = register()
    with raw_connection() as first, raw_connection() as second:
        for publisher in (first, second):
            publisher.autocommit = False
            insert(publisher, consumer, 3)
        before = publish_sizes(60, 60)
        assert [pulled(consumer), pulled(consumer)] == [before[:1], before[1:]]
        assert pulled(consumer) == [], "which closes the window"
        first.commit()
        second.commit()
    fresh = publish_sizes(60, 60)

    pages = [pulled(consumer) for _ in range(8)]

    assert [len(page) for page in pages] == [1] * 8
    assert [page[0] for page in pages[6:]] == fresh
    assert {page[0] for page in pages} == set(Event.objects.values_list("id", flat=True)) - set(
        before
    )
    assert consumer.pull() == []


def insert(publisher: psycopg.Connection[Any], consumer: Consumer, count: int) -> None:
    publisher.execute(
        """
        INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata, resource_key)
        SELECT gen_random_uuid(), %s, 'wanted', convert_to(repeat('x', 60), 'UTF8'), '{}', ''
        FROM generate_series(1, %s)
        """,
        [consumer.stream_id, count],
    )


def test_what_commits_while_pages_are_cut_is_read_when_its_turn_comes():
    consumer = register()
    first = publish_sizes(60, 60, 60)
    assert pulled(consumer) == first[:1]
    with raw_connection() as publisher:
        insert(publisher, consumer, 1)
    later = Event.objects.exclude(id__in=first).get().id

    assert [pulled(consumer) for _ in range(2)] == [[event] for event in first[1:]]
    assert pulled(consumer) + pulled(consumer) == [later]


@pytest.mark.parametrize("text", [b"x" * 200_000, os.urandom(200_000)], ids=["packed", "random"])
@pytest.mark.parametrize("lease", [pulled, claimed])
def test_a_long_body_counts_with_what_is_sent_of_it(text: bytes, lease: Callable[..., list[UUID]]):
    consumer = register(parked=lease is claimed)
    published = publish_many([Event(subject="wanted", body=text) for _ in range(3)], stream="s")
    if lease is claimed:
        consumer.pull()
        Task.objects.all().release()

    pages = [lease(consumer, 100, 400_000) for _ in range(2)]

    assert pages == [[event.id for event in published[:2]], [published[2].id]]


def test_no_more_comes_at_once_than_the_documented_bound(settings: Settings):
    settings.KANTHORQ = {"BODY_SIZE_MAX": BODIES_SIZE_MAX + 1}
    half = BODIES_SIZE_MAX // 2
    consumer = register()
    published = publish_sizes(half, half, 1, BODIES_SIZE_MAX + 1)

    pages = [[task.event_id for task in consumer.pull()] for _ in range(4)]
    assert pages == [published[:2], published[2:3], published[3:], []]
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))
    again = [[task.event_id for task in consumer.claim()] for _ in range(4)]
    assert sorted(map(len, again)) == [0, 1, 1, 2]


def test_a_page_tells_whether_it_was_cut():
    consumer = register()
    publish_sizes(60, 60)

    assert [consumer.pull_page(100, SIZE_MAX).is_full for _ in range(2)] == [True, False]


def test_tasks_that_are_leased_later_are_not_skipped_where_a_page_is_cut():
    consumer = register(parked=True)
    published = publish_sizes(60, 60, 3_000, 60)
    while not consumer.pull_page(100, SIZE_MAX).is_idle:
        pass

    tasks = Task.objects.order_by("id").values_list("event_id", "state")
    assert list(tasks) == [(event, TaskState.PENDING) for event in published]


# Claims


@ANY_SIZES
@example([60, 40, 1, 100, 101, 0, 0, 101], 100)
@given(SIZES, st.sampled_from([1, 2, 3, 100]))
def test_claims_lease_what_is_due_in_order_wherever_bodies_end_them(sizes: list[int], limit: int):
    Consumer.objects.all().delete()
    consumer = register(parked=True, deliver="new")
    published = publish_sizes(*sizes)
    while consumer.pull_page(1_000).leased or not consumer.pull_page(1_000).is_idle:
        pass
    Task.objects.all().release()

    pages = [claimed(consumer, limit) for _ in range(len(sizes) + 1)]

    assert [event for page in pages for event in page] == published
    assert [len(page) for page in pages if page] == [n for n in cut(sizes, limit) if n]


def test_what_a_cut_claim_leaves_has_lost_no_attempt():
    consumer = register()
    publish_sizes(60, 60)
    consumer.pull()
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))

    (first,) = claimed(consumer)

    counts = dict(Task.objects.values_list("event_id", "attempt_count"))
    assert counts.pop(first) == 2
    assert list(counts.values()) == [1]


def test_a_claim_of_a_deleted_event_counts_for_nothing():
    consumer = register()
    gone, large, last = publish_sizes(60, 100, 60)
    consumer.pull()
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM kanthorq_django_event WHERE id = %s", [gone])

    assert [claimed(consumer), claimed(consumer)] == [[gone, large], [last]]


@pytest.mark.parametrize("serialize", [Serialize.ON.value, Serialize.STRICT.value])
def test_a_group_that_is_cut_keeps_its_order(serialize: str):
    consumer = register(serialize=serialize)
    consumer.turns.group_size = 10
    published = publish_sizes(40, 60, 40, 101, key="a")
    consumer.pull()
    groups = []
    while group := claimed(consumer):
        groups.append(group)
        assert claimed(consumer) == [], "its key is busy"
        Task.objects.running().update(state=TaskState.COMPLETED, finalized_at=Now())

    assert groups == [published[:2], published[2:3], published[3:]]


def test_a_group_that_is_cut_begins_with_the_lease_that_ran_out():
    consumer = register(serialize=Serialize.ON.value)
    consumer.turns.group_size = 10
    _, second = publish_sizes(60, 60, key="a")
    consumer.pull()
    Task.objects.filter(event_id=second).update(
        state=TaskState.RUNNING, attempted_at=Now(), lease_epoch=1, attempt_count=1
    )
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))

    assert claimed(consumer) == [second]
    assert claimed(consumer) == [], "whose old holder may run yet"


def test_what_needs_no_turn_is_not_kept_waiting_by_large_bodies_that_have_theirs():
    consumer = register(serialize=Serialize.ON.value)
    free = publish_sizes(60, 60)
    for key in "ab":
        publish_sizes(3_000, key=key)
    consumer.pull()
    Task.objects.update(state=TaskState.AVAILABLE, schedule_at=Now(), attempt_count=0)

    (one, other), second = claimed(consumer), claimed(consumer)

    assert {one, other} & set(free)
    assert len({one, other, *second}) == 4


def test_a_cut_claim_does_not_look_as_if_all_turns_were_given():
    consumer = register(serialize=Serialize.ON.value)
    for key in "ab":
        publish_sizes(60, key=key)
    consumer.pull()

    told = []
    for _ in range(2):
        claimed(consumer)
        told.append(consumer.turns.were_all_given)
    assert told == [False, True]
