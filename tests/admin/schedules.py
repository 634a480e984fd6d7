"""Schedules for the tests of their pages, and what a browser would send of them."""

from datetime import UTC, datetime
from typing import Any

from django.test import Client

from kanthorq_django import schedule
from kanthorq_django.models import Schedule, Stream
from tests.admin.pages import page

VIEWS = ("view_schedule",)


def kept(name: str = "report", **given: Any) -> Schedule:
    options: dict[str, Any] = {
        "rrule": "FREQ=WEEKLY;BYDAY=MO",
        "dtstart": datetime(2026, 1, 5, 8, tzinfo=UTC),  # a Monday, 09:00 in Berlin
        "timezone": "Europe/Berlin",
        "subject": "report.due",
        "stream": "reports",
        "body": b'{"kind": "weekly"}',
        "metadata": {"by": "code"},
    }
    return schedule(name, **(options | given))


def filled(stream: Stream, **given: Any) -> dict[str, Any]:
    """Return what a browser sends for a new schedule."""
    return {
        "name": "report",
        "stream": stream.pk,
        "subject": "report.due",
        "body": '{"kind": "weekly"}',
        "metadata": "{}",
        "resource_key": "",
        "rrule": "FREQ=WEEKLY;BYDAY=MO",
        "dtstart": "2026-01-05T09:00",
        "timezone": "Europe/Berlin",
        "exdates": "",
        "catchup": "last",
    } | given


def shown_in(client: Client, row: Schedule) -> dict[str, Any]:
    """Return what the browser would send back for a form that nobody touched."""
    form = client.get(page("schedule_change", row.pk)).context["adminform"].form
    return {
        name: form[name].value() if form[name].value() is not None else "" for name in form.fields
    }


def errors_of(response: Any) -> dict[str, list[str]]:
    assert response.status_code == 200
    return dict(response.context["adminform"].form.errors)
