"""What people who write schedules get to see of secrets in them, and what becomes of these."""

import json
from typing import Any

import pytest
from django.test import Client

from kanthorq_django.models import Schedule
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of
from tests.admin.schedules import VIEWS, errors_of, filled, kept, shown_in

pytestmark = pytest.mark.django_db

BODY = {"to": "ann", "auth": {"password": "hunter2"}, "card": {"number": "4111"}}
METADATA = {"team": "sales", "api_key": "abc123"}


@pytest.fixture
def author(client_of: MakeClient) -> Client:
    return client_of("view_body", "add_schedule", "change_schedule", views=VIEWS)


@pytest.fixture
def row() -> Schedule:
    return kept(body=json.dumps(BODY), metadata=METADATA)


def stored() -> tuple[Any, Any]:
    row = Schedule.objects.get()
    return json.loads(bytes(row.body)), row.metadata


def save(client: Client, row: Schedule, **changes: Any) -> Any:
    return client.post(page("schedule_change", row.pk), shown_in(client, row) | changes)


def test_the_form_shows_no_secret(author: Client, row: Schedule):
    response = author.get(page("schedule_change", row.pk))
    for secret in (b"hunter2", b"4111", b"abc123"):
        assert secret not in response.content
    assert b"[redacted]" in response.content


def test_a_form_that_nobody_touched_changes_nothing(author: Client, row: Schedule):
    form = author.get(page("schedule_change", row.pk)).context["adminform"].form
    assert save(author, row).status_code == 302
    assert stored() == (BODY, METADATA)
    assert bytes(Schedule.objects.get().body) == bytes(row.body)
    assert not type(form)(shown_in(author, row), instance=row).changed_data


def test_browsers_line_ends_are_no_change(author: Client):
    row = kept(body=b"a: 1\r\npassword: hunter2\r\nb: 2\r\n")
    body = shown_in(author, row)["body"].replace("\n", "\r\n")
    assert save(author, row, body=body).status_code == 302
    assert bytes(Schedule.objects.get().body) == bytes(row.body)


def test_a_change_around_secrets_leaves_them(author: Client, row: Schedule):
    form = shown_in(author, row)
    changed = {
        "body": form["body"].replace('"ann"', '"bob"'),
        "metadata": form["metadata"].replace('"sales"', '"support"'),
    }
    assert save(author, row, **changed).status_code == 302
    assert stored() == (BODY | {"to": "bob"}, METADATA | {"team": "support"})


def test_a_secret_that_is_written_out_is_stored(author: Client, row: Schedule):
    body = json.dumps(BODY | {"auth": {"password": "new"}, "card": "[redacted]"})
    assert save(author, row, body=body, metadata='{"api_key": "new"}').status_code == 302
    assert stored() == (BODY | {"auth": {"password": "new"}}, {"api_key": "new"})


@pytest.mark.parametrize(
    ("given", "field", "place"),
    [
        ({"body": '{"token": "[redacted]"}'}, "body", "$.token"),
        ({"body": "password=[redacted]"}, "body", "a text that was changed"),
        ({"metadata": '{"token": "[redacted]"}'}, "metadata", "$.token"),
        ({"metadata": '[{"api_key": "[redacted]"}]'}, "metadata", "$[0].api_key"),
    ],
)
def test_no_mask_is_ever_stored(
    author: Client, row: Schedule, given: dict[str, str], field: str, place: str
):
    errors = errors_of(save(author, row, **given))
    assert errors == {field: [f"[redacted] in {place}: write out what is to stand there."]}
    assert stored() == (BODY, METADATA)


def test_a_new_schedule_takes_no_mask_either(author: Client, row: Schedule):
    given = filled(row.stream, name="other", body='{"token": "[redacted]"}')
    assert errors_of(author.post(page("schedule_add"), given)).keys() == {"body"}
    assert Schedule.objects.count() == 1


def test_a_form_that_is_wrong_comes_back_without_the_secrets(author: Client, row: Schedule):
    response = save(author, row, rrule="FREQ=SOMETIMES")
    assert errors_of(response).keys() == {"rrule"}
    assert b"hunter2" not in response.content
    assert b"abc123" not in response.content


def test_beside_a_form_that_is_wrong_stands_what_is_stored(author: Client, row: Schedule):
    told = text_of(save(author, row, rrule="FREQ=SOMETIMES", timezone="Asia/Tokyo"))
    assert "every week on Monday at 09:00 Europe/Berlin" in told
    assert "cannot be read" not in told


def test_who_may_not_see_bodies_can_change_the_rest(client_of: MakeClient, row: Schedule):
    client = client_of("change_schedule", views=VIEWS)
    smuggled = {"subject": "report.other", "body": "x"}
    assert save(client, row, **smuggled).status_code == 302
    assert stored() == (BODY, METADATA)
    assert Schedule.objects.get().subject == "report.other"


def test_the_form_for_a_new_schedule_can_be_sent_as_it_comes(author: Client, row: Schedule):
    form = author.get(page("schedule_add")).context["adminform"].form
    given = filled(row.stream, name="other") | {"metadata": form["metadata"].value()}
    assert author.post(page("schedule_add"), given).status_code == 302
    assert Schedule.objects.get(name="other").metadata == {}
