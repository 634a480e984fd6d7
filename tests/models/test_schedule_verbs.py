"""Which schedules are moved, and publish what is due, whatever their queryset looks like."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import transaction
from django.db.models import Count, F

from kanthorq_django import schedule
from kanthorq_django.models import Event, Schedule
from tests.concurrency import DEADLINE_SECONDS, begin_elsewhere, is_waited_for, wait_until

pytestmark = pytest.mark.django_db


def declare(name: str, **given: Any) -> Schedule:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return schedule(name, rrule="FREQ=DAILY", dtstart=start, subject="report.due", **given)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda: Schedule.objects.values("name").union(Schedule.objects.values("name")),
        lambda: Schedule.objects.filter(name="first").union(Schedule.objects.filter(name="second")),
        lambda: Schedule.objects.difference(Schedule.objects.filter(name="third")),
        lambda: Schedule.objects.select_related("stream").select_for_update(of=("self", "stream")),
        lambda: Schedule.objects.filter(stream__schedules__name__in=["first", "second"]),
    ],
)
def test_schedules_are_moved_whatever_their_queryset_looks_like(chosen: Callable[[], Any]):
    first, second = declare("first"), declare("second")
    both = tuple(sorted([first.pk, second.pk]))
    assert chosen().cancel().updated == both
    assert chosen().cancel().noop == both
    assert chosen().resume().updated == both
    assert Schedule.objects.filter(cancelled_at=None).count() == 2


@pytest.mark.parametrize(
    "chosen",
    [
        lambda: Schedule.objects.only("name"),
        lambda: Schedule.objects.values("name"),
        lambda: Schedule.objects.filter(stream__name="default").distinct(),
        lambda: Schedule.objects.alias(count=Count("stream__events")).filter(count=0),
        lambda: Schedule.objects.filter(name="first").union(Schedule.objects.filter(name="second")),
    ],
)
def test_schedules_publish_whatever_their_queryset_looks_like(chosen: Callable[[], Any]):
    for name in ("first", "second"):
        declare(name)
    assert chosen().publish_due() == 0
    Schedule.objects.update(next_at=F("dtstart"))
    assert chosen().publish_due() == 2
    assert chosen().publish_due() == 0


def test_what_a_slice_has_due_is_not_published_as_it_has_others_a_moment_later():
    for name in ("first", "second"):
        declare(name)
    Schedule.objects.update(next_at=F("dtstart"))
    with pytest.raises(TypeError, match="Cannot publish_due a query once a slice has been taken"):
        Schedule.objects.order_by("next_at")[:1].publish_due()
    assert not Event.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_queryset_that_locks_its_rows_waits_for_nobody_who_publishes():
    first, _ = declare("first"), declare("second")
    Schedule.objects.update(next_at=F("dtstart"))
    with transaction.atomic():
        Schedule.objects.select_for_update().get(pk=first.pk)
        publishing = begin_elsewhere(Schedule.objects.select_for_update().publish_due)
        assert publishing.result(DEADLINE_SECONDS) == 1


@pytest.mark.django_db(transaction=True)
def test_what_left_the_queryset_before_it_was_locked_is_a_noop():
    first, second = declare("first", resource_key="a"), declare("second", resource_key="a")
    with transaction.atomic():
        Schedule.objects.filter(pk=first.pk).update(resource_key="b")
        cancelling = begin_elsewhere(Schedule.objects.filter(resource_key="a").cancel)
        wait_until(is_waited_for)
    outcome = cancelling.result(DEADLINE_SECONDS)
    assert (outcome.updated, outcome.noop) == ((second.pk,), (first.pk,))
    assert not Schedule.objects.get(pk=first.pk).cancelled_at
