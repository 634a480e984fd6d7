"""Links lead only where their reader may go."""

import re

import pytest
from django.test import Client

from kanthorq_django.admin.consumer import ConsumerAdmin
from kanthorq_django.models import Task, TaskState, Worker
from tests.admin.conftest import VIEWS, MakeClient
from tests.admin.pages import page
from tests.admin.schedules import kept
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db

EVERY_VIEW = (*VIEWS, "view_schedule")


@pytest.fixture
def task(db: None) -> Task:
    task: Task = TaskFactory.create(state=TaskState.DISCARDED)
    consumer = task.consumer
    Worker.objects.create(host="shop-1", pid=42, concurrency=10, consumers=[consumer.name])
    return task


@pytest.fixture
def addresses(task: Task) -> dict[str, list[str]]:
    """The list and a row's page of each noun that leads to others."""
    rows = {
        "stream": task.consumer.stream_id,
        "event": task.event_id,
        "consumer": task.consumer_id,
        "task": task.pk,
        "schedule": kept().pk,
    }
    return {
        noun: [page(f"{noun}_changelist"), page(f"{noun}_change", pk)] for noun, pk in rows.items()
    }


def _linked(client: Client, address: str) -> set[str]:
    """Return where the links of the page lead, but for those to itself and its list."""
    response = client.get(address)
    assert response.status_code == 200
    own = address.split("/")[3]
    found = set(re.findall(r'href="(/admin/kanthorq_django/[^"?]+)', response.content.decode()))
    return {link for link in found if link.split("/")[3] != own}


@pytest.mark.parametrize("noun", ["stream", "event", "consumer", "task", "schedule"])
def test_who_may_see_one_noun_alone_is_led_to_no_other(
    client_of: MakeClient, addresses: dict[str, list[str]], noun: str
):
    client = client_of(views=(f"view_{noun}",))
    assert [_linked(client, address) for address in addresses[noun]] == [set(), set()]


def test_every_link_leads_to_a_page_for_who_may_see_all(
    client_of: MakeClient, addresses: dict[str, list[str]], task: Task
):
    client = client_of(views=EVERY_VIEW)
    links = {
        noun: set().union(*(_linked(client, address) for address in both))
        for noun, both in addresses.items()
    }

    stream, consumer = (
        page("stream_change", task.consumer.stream_id),
        page("consumer_change", task.consumer_id),
    )
    assert links["stream"] >= {consumer, page("consumer_changelist"), page("event_changelist")}
    assert links["event"] >= {stream, consumer, page("task_change", task.pk)}
    assert links["consumer"] >= {stream, page("task_changelist")}
    assert links["task"] >= {consumer, page("event_change", task.event_id)}
    assert {client.get(link).status_code for found in links.values() for link in found} == {200}


def test_an_events_page_leads_to_the_consumers_of_its_tasks(client_of: MakeClient, task: Task):
    client = client_of(views=("view_event", "view_task", "view_consumer"))
    shown = _linked(client, page("event_change", task.event_id))
    assert shown >= {page("consumer_change", task.consumer_id), page("task_change", task.pk)}


def test_a_projects_own_rule_of_who_may_see_is_heeded(
    client_of: MakeClient, task: Task, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ConsumerAdmin, "has_view_permission", lambda *_: False)
    client = client_of()
    assert page("consumer_change", task.consumer_id) not in _linked(
        client, page("task_change", task.pk)
    )
