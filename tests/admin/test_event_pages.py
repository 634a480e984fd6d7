from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from kanthorq_django.admin import content
from kanthorq_django.admin.event import EventAdmin
from kanthorq_django.models import Consumer, Event, Task, TaskState
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of, texts_between
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = pytest.mark.django_db

BODY_SIZE = 'octet_length("kanthorq_django_event"."body")'


def _html(client: Client, event: Event) -> str:
    return client.get(page("event_change", event.pk)).content.decode()


def _read_all(consumer: Consumer) -> None:
    """Let ``consumer`` have read its stream, as after a pull."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_consumer"
            """ SET "cursor" = (pg_current_xact_id()::text::bigint + 1 || ':'"""
            "   || pg_current_xact_id()::text::bigint + 1 || ':')::pg_snapshot WHERE id = %s",
            [consumer.pk],
        )


def test_a_json_body_is_indented_and_escaped(operator: Client):
    html = _html(operator, EventFactory.create(body={"name": "<script>alert(1)</script>"}))
    assert "{\n  &quot;name&quot;: &quot;&lt;script&gt;alert(1)&lt;/script&gt;&quot;\n}" in html
    assert "<script>alert" not in html


def test_a_text_body_is_escaped(operator: Client):
    html = _html(operator, EventFactory.create(body="<img src=x onerror=alert(1)>"))
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "<img src=x" not in html


def test_a_binary_body_is_dumped(operator: Client):
    html = _html(operator, EventFactory.create(body=b"\x00<b>"))
    assert "00000000  00 3c 62 3e" in html
    assert ".&lt;b&gt;" in html


def test_an_empty_body_says_so(operator: Client):
    text = text_of(operator.get(page("event_change", EventFactory.create(body=b"").pk)))
    assert "empty, 0 bytes" in text


def test_a_long_body_is_cut_and_its_size_told(operator: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(content, "READ_MAX", 10)
    text = text_of(operator.get(page("event_change", EventFactory.create(body="a" * 2048).pk)))
    assert "text, 2.0 KB; only the beginning is shown aaaaaaaaaa Tasks" in text


def test_metadata_is_shown_escaped(operator: Client):
    html = _html(operator, EventFactory.create(metadata={"who": "<i>"}))
    assert "&quot;who&quot;: &quot;&lt;i&gt;&quot;" in html


def test_without_its_permission_a_body_is_neither_shown_nor_read(viewer: Client):
    event = EventFactory.create(body="confidential", metadata={"trace": "abc"})

    with CaptureQueriesContext(connection) as queries:
        text = text_of(viewer.get(page("event_change", event.pk)))

    assert "confidential" not in text
    assert "12 bytes; you may not see it." in text
    assert "trace" in text
    assert not [
        query["sql"] for query in queries if '"body"' in query["sql"].replace(BODY_SIZE, "")
    ]


def test_no_list_reads_bodies(admin_client: Client):
    TaskFactory.create(state=TaskState.AVAILABLE)
    for name in ("event_changelist", "task_changelist"):
        with CaptureQueriesContext(connection) as queries:
            admin_client.get(page(name))
        assert not [
            query["sql"] for query in queries if '"body"' in query["sql"].replace(BODY_SIZE, "")
        ]


@pytest.mark.parametrize("lookup", ["body", "body__contains", "metadata__trace__startswith"])
def test_a_hidden_body_cannot_be_guessed_through_the_address(viewer: Client, lookup: str):
    EventFactory.create(body="confidential")
    assert viewer.get(page("event_changelist"), {lookup: "c"}).status_code == 400


def test_an_event_lists_its_tasks(viewer: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED, consumer__name="emails")
    response = viewer.get(page("event_change", task.event_id))
    assert page("task_change", task.pk) in response.content.decode()
    assert f"{task.pk} emails Completed 1 / 16" in text_of(response)


def test_an_event_is_found_by_its_id(viewer: Client):
    wanted, _other = EventFactory.create_batch(2)
    listed = viewer.get(page("event_changelist"), {"q": f" {wanted.pk} "}).context["cl"]
    assert list(listed.result_list) == [wanted]


def test_events_are_found_by_the_beginning_of_their_subject(viewer: Client):
    wanted = EventFactory.create(subject="order.paid.v2")
    EventFactory.create(subject="refund.order.paid")
    listed = viewer.get(page("event_changelist"), {"q": "order.paid"}).context["cl"]
    assert list(listed.result_list) == [wanted]


def test_the_events_of_a_stream_come_newest_first(viewer: Client):
    first = EventFactory.create()
    second = EventFactory.create(stream=first.stream)
    EventFactory.create()
    query = {"stream__id__exact": first.stream_id}
    listed = viewer.get(page("event_changelist"), query).context["cl"]
    assert list(listed.result_list) == [second, first]


def test_an_event_that_everybody_is_done_with_can_be_deleted_with_its_tasks(
    client_of: MakeClient,
):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    _read_all(task.consumer)
    client = client_of("delete_event")

    asked = client.get(page("event_delete", task.event_id))
    response = client.post(page("event_delete", task.event_id), {"post": "yes"})

    assert "1 final task" in text_of(asked)
    assert response.status_code == 302
    assert not Event.objects.exists()
    assert not Task.objects.exists()
    assert LogEntry.objects.get().object_id == str(task.event_id)


@pytest.mark.parametrize(
    "state", [TaskState.PENDING, TaskState.AVAILABLE, TaskState.RUNNING, TaskState.RETRYABLE]
)
def test_an_event_with_an_open_task_cannot_be_deleted(admin_client: Client, state: TaskState):
    task = TaskFactory.create(state=state)
    _read_all(task.consumer)
    address = page("event_delete", task.event_id)
    assert admin_client.get(address).status_code == 403
    assert admin_client.post(address, {"post": "yes"}).status_code == 403
    assert Event.objects.exists()
    assert Task.objects.exists()


def test_an_event_that_a_consumer_has_not_read_cannot_be_deleted(admin_client: Client):
    consumer = ConsumerFactory.create()
    event = EventFactory.create(stream=consumer.stream)
    address = page("event_delete", event.pk)
    assert admin_client.post(address, {"post": "yes"}).status_code == 403
    assert Event.objects.exists()


def test_an_event_whose_task_is_reset_while_it_is_being_deleted_stays(
    client_of: MakeClient, monkeypatch: pytest.MonkeyPatch
):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    _read_all(task.consumer)
    ask = EventAdmin.has_delete_permission

    def reset_after(*args: Any) -> bool:
        is_allowed = ask(*args)
        Task.objects.filter(pk=task.pk).reset()
        return is_allowed

    monkeypatch.setattr(EventAdmin, "has_delete_permission", reset_after)
    client = client_of("delete_event")

    response = client.post(page("event_delete", task.event_id), {"post": "yes"})

    assert response.status_code == 403
    assert Event.objects.exists()
    assert not LogEntry.objects.exists()


def test_who_may_not_delete_events_sees_no_way_to(viewer: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    _read_all(task.consumer)
    shown = viewer.get(page("event_change", task.event_id)).content.decode()
    assert page("event_delete", task.event_id) not in shown
    assert viewer.post(page("event_delete", task.event_id), {"post": "yes"}).status_code == 403


def test_ids_are_spelled_as_everywhere(viewer: Client):
    event = EventFactory.create()
    shown = viewer.get(page("event_change", event.pk))
    assert f"ID: {event.pk}" in text_of(shown)
    (transaction_id,) = texts_between(shown, "Transaction ID:", "Close")
    assert f" {event.xid} " in transaction_id
