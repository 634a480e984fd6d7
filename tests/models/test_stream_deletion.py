"""Streams go only when nobody publishes into them."""

from collections.abc import Callable

import pytest
from django.db import OperationalError, transaction
from django.db.models import ProtectedError

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Event, Stream, stream
from tests.concurrency import (
    DEADLINE_SECONDS,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)

pytestmark = pytest.mark.django_db(transaction=True)


def one() -> object:
    return publish("a", stream="s")


def once() -> object:
    return publish("a", stream="s", idempotency_key="k")


def many() -> object:
    return publish_many([Event(subject="a"), Event(subject="b")], stream="s")


def by_instance() -> object:
    return Stream.objects.get(name="s").delete()


def by_queryset() -> object:
    return Stream.objects.filter(name="s").delete()


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
@pytest.mark.parametrize("publish_some", [one, once, many])
def test_a_stream_into_which_somebody_publishes_stays(
    publish_some: Callable[[], object], delete: Callable[[], object]
):
    Stream.objects.register("s")
    with transaction.atomic():
        publish_some()
        deleted = begin_elsewhere(delete)
        wait_until(is_waited_for)
    with pytest.raises(ProtectedError):
        deleted.result(DEADLINE_SECONDS)
    assert Event.objects.filter(stream__name="s").exists()


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
@pytest.mark.parametrize("publish_some", [one, once, many])
def test_what_is_published_while_a_stream_is_deleted_begins_it_anew(
    publish_some: Callable[[], object], delete: Callable[[], object]
):
    Stream.objects.register("s")
    with transaction.atomic():
        delete()
        published = begin_elsewhere(publish_some)
        wait_until(is_waited_for)
    published.result(DEADLINE_SECONDS)
    assert Event.objects.filter(stream__name="s").count() == Event.objects.count() > 0


def test_a_deletion_waits_for_publishers_only_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "PUBLISHERS_WAIT", stream.PUBLISHERS_WAIT / 1_000)
    with transaction.atomic():
        publish("a", stream="s")
        with pytest.raises(OperationalError, match="lock timeout"):
            elsewhere(by_queryset)
