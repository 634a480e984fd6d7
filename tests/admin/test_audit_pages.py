"""How the audit reads."""

import pytest
from django.test import Client

from kanthorq_django.models import OperatorAction
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of

pytestmark = pytest.mark.django_db


@pytest.fixture
def auditor(client_of: MakeClient) -> Client:
    return client_of(views=("view_operatoraction",))


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"noop": 0, "updated": 1, "requested": 0}, "tasks.cancel 1 updated ann"),
        ({"noop": 2, "updated": 3_000, "requested": 1}, "3,000 updated, 1 requested, 2 noop ann"),
        ({"noop": 2, "updated": 0, "requested": 1}, "tasks.cancel 1 requested, 2 noop ann"),
        ({"fields": 1}, "tasks.cancel 1 field ann"),
        ({"fields": 2}, "tasks.cancel 2 fields ann"),
        ({"events": 1, "tasks": 1}, "tasks.cancel 1 task, 1 event ann"),
        ({"consumers": 1, "tasks": 2}, "tasks.cancel 2 tasks, 1 consumer ann"),
        ({"events": 2, "tasks": 3_000}, "tasks.cancel 3,000 tasks, 2 events ann"),
        ({"deleted": 1}, "tasks.cancel 1 deleted ann"),
        ({}, "tasks.cancel — ann"),
    ],
)
def test_what_was_updated_is_told_first_and_what_was_not_done_is_left_out(
    auditor: Client, counts: dict[str, int], told: str
):
    OperatorAction.objects.create(operator="ann", action="tasks.cancel", counts=counts)
    assert told in text_of(auditor.get(page("operatoraction_changelist")))
