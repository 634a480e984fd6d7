"""What pages and the console show of bodies and metadata."""

import json
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.test import Client
from django.utils import timezone

from kanthorq_django import publish, schedule
from kanthorq_django.admin.content import READ_MAX
from kanthorq_django.models import Consumer, Event, OperatorAction, Task, TaskState
from kanthorq_django.models.audit import Order
from tests.admin.conftest import MakeClient, client_of
from tests.admin.pages import page, text_of
from tests.admin.schedules import kept
from tests.commands.console import kanthorq
from tests.factories import TaskFactory

__all__ = ["client_of"]  # a fixture

pytestmark = pytest.mark.django_db

BODY = {"order": "blue", "payment": {"card": {"number": "4111"}, "cardHolder": "Ann"}, "qty": 2}


def owed(body: Any, **more: Any) -> Task:
    task: Task = TaskFactory.create(event__body=body, state=TaskState.COMPLETED, **more)
    return task


@pytest.fixture
def shown(client_of: MakeClient) -> Any:
    client = client_of("view_body", "view_schedule")
    return lambda noun, row: text_of(client.get(page(f"{noun}_change", row.pk)))


def test_the_events_page_shows_the_body_without_the_values_of_secret_keys(shown: Any):
    told = shown("event", owed(BODY).event)
    assert "blue" in told
    assert "[redacted]" in told
    assert "4111" not in told
    assert "Ann" not in told


def test_metadata_and_results_are_redacted_too(shown: Any):
    task = owed(BODY, event__metadata={"authToken": "abc123"}, result={"password": "hunter2"})
    for told, secret in ((shown("event", task.event), "abc123"), (shown("task", task), "hunter2")):
        assert "[redacted]" in told
        assert secret not in told


def test_of_a_body_that_is_cut_no_secret_is_shown(shown: Any):
    body = {"secret": "hunter2", "filler": "x" * READ_MAX}
    told = shown("event", owed(body).event)
    assert "filler" in told
    assert "hunter2" not in told


def test_a_schedules_page_is_redacted(shown: Any):
    row = kept(body=BODY, metadata={"api_key": "abc123"})
    told = shown("schedule", row)
    assert "[redacted]" in told
    assert "4111" not in told
    assert "abc123" not in told


def test_the_setting_says_which_keys(shown: Any, settings):
    settings.KANTHORQ = {"REDACTED_KEYS": ["order"]}
    told = shown("event", owed(BODY).event)
    assert "blue" not in told
    assert "4111" in told


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_console_redacts_bodies_metadata_and_results(form: tuple[str, ...]):
    task = owed(BODY, event__metadata={"token": "abc123"}, result={"password": "hunter2"})
    told = kanthorq("tasks", "show", task.event_id, *form).out
    assert "[redacted]" in told
    assert "blue" in told
    for secret in ("4111", "Ann", "abc123", "hunter2"):
        assert secret not in told


FAILURE = {
    "attempt": 1,
    "verb": "handle",
    "at": "2026-01-01T00:00:00Z",
    "error": "TokenError: signed with secret=hunter2",
    "stack": "Traceback:\n  File 'a'\n    login(password='hunter2')\nshop.TokenError: pin: hunter2",
}


def test_errors_and_tracebacks_are_redacted_on_pages(client_of: MakeClient):
    task = owed(BODY, attempted_errors=[FAILURE])
    Task.objects.filter(pk=task.pk).update(state=TaskState.DISCARDED)
    client = client_of()
    for address in (page("task_change", task.pk), page("task_changelist")):
        told = text_of(client.get(address))
        assert "TokenError: signed with secret=[redacted]" in told
        assert "hunter2" not in told


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_console_redacts_errors_and_tracebacks(form: tuple[str, ...]):
    task = owed(BODY, attempted_errors=[FAILURE])
    told = kanthorq("tasks", "show", task.event_id, *form).out
    assert "TokenError: signed with secret=[redacted]" in told
    assert "hunter2" not in told


def test_reasons_of_failed_cancellations_are_redacted(client_of: MakeClient):
    moment = timezone.now()
    failure = FAILURE | {"verb": "cancel", "at": moment.isoformat()}
    task = owed(BODY, attempted_errors=[failure], cancel_requested_at=moment)
    Task.objects.filter(pk=task.pk).update(
        state=TaskState.DISCARDED, finalized_at=moment, cancel_attempt_count=1
    )
    Consumer.objects.update(has_cancel_handler=True)
    for told in (
        text_of(client_of().get(page("consumer_change", task.consumer_id))),
        kanthorq("stats").out,
        kanthorq("stats", "--json").out,
    ):
        assert "signed with secret=[redacted]" in told
        assert "hunter2" not in told


@pytest.mark.parametrize("body", [b"\xff\x00password\xa7hunter2", b"\x00password\x01hunter2"])
def test_a_binary_body_is_shown_up_to_the_first_secret_key(shown: Any, body: bytes):
    task = owed(body)
    hidden = b"hunter2".hex(" ")
    for told in (shown("event", task.event), kanthorq("tasks", "show", task.event_id).out):
        assert b"password".hex(" ")[:8] in told
        assert "[redacted]" in told
        assert "hunter" not in told
        assert hidden not in told
    (told,) = kanthorq("tasks", "show", task.event_id, "--json").json
    assert (told["event"]["body"], told["event"]["body_encoding"]) == (None, "redacted")


def test_the_audit_redacts_what_was_searched_for(client_of: MakeClient):
    Order(
        operator="a", origin=OperatorAction.Origin.ADMIN, selection={"all": {"token": ["hunter2"]}}
    ).record("tasks.cancel", using="default", counts={"updated": 1})
    row = OperatorAction.objects.get()
    told = text_of(client_of("view_operatoraction").get(page("operatoraction_change", row.pk)))
    assert "[redacted]" in told
    assert "hunter2" not in told


def test_the_console_redacts_the_metadata_of_schedules():
    kept(metadata={"token": "abc123"})
    for form in ((), ("--json",)):
        told = kanthorq("schedules", "show", "report", *form).out
        assert "[redacted]" in told
        assert "abc123" not in told


def test_without_the_permission_to_view_bodies_none_is_on_any_page(client_of: MakeClient):
    task = owed({"note": "confidential"})
    row = kept(body='{"note": "confidential"}')
    client = client_of("view_schedule", "change_schedule", "view_operatoraction")
    for noun, pk in (("event", task.event_id), ("task", task.pk), ("schedule", row.pk)):
        for name, args in ((f"{noun}_change", (pk,)), (f"{noun}_changelist", ())):
            response = client.get(page(name, *args))
            assert response.status_code == 200
            assert b"confidential" not in response.content


@pytest.fixture
def encrypted(settings) -> Event:
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    return publish("card.used", BODY)


def test_an_encrypted_body_is_opened_and_redacted_on_its_page(shown: Any, encrypted: Event):
    told = shown("event", encrypted)
    assert "blue" in told
    assert "4111" not in told


def test_a_page_and_the_console_tell_that_no_key_fits(shown: Any, encrypted: Event, settings):
    task = TaskFactory.create(event=encrypted, state=TaskState.COMPLETED)
    row = schedule("report", **_daily())
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    assert "none of the 1 keys" in shown("event", encrypted)
    assert "none of the 1 keys" in shown("schedule", row)
    assert "none of the 1 keys" in kanthorq("tasks", "show", task.event_id).out
    (told,) = kanthorq("tasks", "show", task.event_id, "--json").json
    assert (told["event"]["body"], told["event"]["body_encoding"]) == (None, "undecodable")
    assert "no key opens it" in kanthorq("schedules", "show", "report").out


def test_a_schedule_that_no_key_opens_can_still_be_looked_at_in_its_form(
    admin_client: Client, settings
):
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    row = schedule("report", **_daily())
    settings.KANTHORQ = {}
    assert admin_client.get(page("schedule_change", row.pk)).status_code == 200


def _daily() -> dict[str, Any]:
    row = kept("other")
    given = {"rrule": row.rrule, "dtstart": row.dtstart, "subject": "report.due"}
    return given | {"body": json.dumps(BODY)}
