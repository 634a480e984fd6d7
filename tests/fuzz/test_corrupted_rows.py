"""Rows that no code of ours wrote: pages and commands show them, and they stop nobody else."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.test import Client

from kanthorq_django import publish, schedule
from kanthorq_django.models import Consumer, Event, Schedule
from tests.admin.pages import page
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory

pytestmark = pytest.mark.django_db

SCHEDULES: list[dict[str, Any]] = [
    {"exdates": 5},
    {"exdates": {"a": 1}},
    {"exdates": [5]},
    {"exdates": "x"},
    {"exdates": ["0001-01-01T00:00:00+00:00"]},
    {"metadata": []},
    {"metadata": 5},
    {"metadata": {"a": "x" * 20_000}},
    {"rrule": ""},
    {"rrule": "FREQ=SECONDLY"},
    {"timezone": "Mars"},
    {"subject": "a b"},
    {"resource_key": "\n"},
    {"catchup": "zzz"},
    {"body": b"x" * 300_000},
    {"dtstart": datetime(1, 1, 1, tzinfo=UTC)},
    {"dtstart": datetime(9999, 12, 31, 23, 59, tzinfo=UTC)},
    {"last_at": datetime(1, 1, 1, tzinfo=UTC)},
    {"last_at": datetime(9999, 12, 31, 23, 59, tzinfo=UTC)},
]


def told(change: dict[str, Any]) -> str:
    return str(change)[:40]


@pytest.mark.parametrize("change", SCHEDULES, ids=told)
def test_a_corrupted_schedule_is_shown_and_keeps_no_other_one_waiting(
    admin_client: Client, change: dict[str, Any]
):
    for name in ("bad", "good"):
        start = datetime(2026, 1, 5, 8, tzinfo=UTC)
        schedule(
            name, rrule="FREQ=DAILY", dtstart=start, subject="due", timezone="America/New_York"
        )
    bad = Schedule.objects.get(name="bad")
    Schedule.objects.filter(pk=bad.pk).update(**change)
    Schedule.objects.update(next_at=Now() - timedelta(days=2))

    for address in (page("schedule_change", bad.pk), page("schedule_changelist")):
        assert admin_client.get(address).status_code == 200
    for line in (["list"], ["list", "--json"], ["show", "bad"], ["show", "bad", "--json"]):
        assert "bad" in kanthorq("schedules", *line).out
    Schedule.objects.publish_due()
    assert Event.objects.filter(metadata__schedule="good").exists()


@pytest.mark.parametrize("filters", ['"x"', "[1]", '{"a": 1}', '["a..b"]', '["\\u202e"]', "[]"])
def test_corrupted_filters_of_a_consumer_are_shown(admin_client: Client, filters: str):
    consumer = ConsumerFactory.create()
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_consumer SET subject_includes = %s::jsonb", [filters]
        )

    for address in (page("consumer_change", consumer.pk), page("consumer_changelist")):
        assert admin_client.get(address).status_code == 200
    assert consumer.name in kanthorq("stats").out
    assert Consumer.objects.get().claim() == []


@pytest.mark.parametrize("value", ["5", '"x"', "[1]", "null", '{"hops": "x"}'])
def test_corrupted_metadata_of_an_event_are_shown(admin_client: Client, value: str):
    event = publish("order.paid")
    with connection.cursor() as cursor:
        cursor.execute("UPDATE kanthorq_django_event SET metadata = %s::jsonb", [value])

    for address in (page("event_change", event.pk), page("event_changelist")):
        assert admin_client.get(address).status_code == 200
