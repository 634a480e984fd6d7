from urllib.parse import urlencode

import pytest
from django.test import Client

from kanthorq_django.models import Event, Task, TaskState, Worker
from tests.admin.pages import page
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db

LISTS = ("stream", "event", "consumer", "task", "worker", "schedule")
SEARCHES = (
    "' OR 1=1 --",
    '"; DROP TABLE kanthorq_django_task; --',
    "%",
    "_",
    "\\",
    "order.>",
    "\x00",
    "a\x00b",
    "x" * 10_000,
    "\u202e\u200b",
    "0" * 32,
    "{" + "0" * 32 + "}",
    "9" * 5_000,
)
QUERIES = (
    "o=999&p=-1",
    "o=-1.2.x&p=abc",
    "o=1.1.1.1&p=0",
    "p=99999999999999999999",
    "all=1",
    "state__exact=abc",
    "state__exact=99999999999999999999",
    "state__exact=%00",
    "state__isnull=True",
    "consumer__id__exact=abc",
    "consumer__id__exact=99999999999999999999",
    "consumer__id__exact=%00",
    "stream__id__exact=' OR 1=1",
    "event__id__exact=1",
    "event__id__exact=%00",
    "stuck=' OR 1=1",
    "life=%00",
    "_facets=True",
    "_popup=1",
    "e=1",
    "utm_source=mail",
)


@pytest.fixture(autouse=True)
def task(db: None) -> Task:
    Worker.objects.create(host="shop-1", pid=42, concurrency=10, consumers=[])
    task: Task = TaskFactory.create(state=TaskState.RETRYABLE)
    return task


def _status(client: Client, noun: str, query: str) -> int:
    return client.get(f"{page(f'{noun}_changelist')}?{query}", follow=True).status_code


@pytest.mark.parametrize("noun", LISTS)
@pytest.mark.parametrize("search", SEARCHES)
def test_any_search_gives_a_page(admin_client: Client, noun: str, search: str):
    assert _status(admin_client, noun, urlencode({"q": search})) == 200


@pytest.mark.parametrize("noun", LISTS)
@pytest.mark.parametrize("query", QUERIES)
def test_any_query_gives_a_page_or_is_refused(admin_client: Client, noun: str, query: str):
    assert _status(admin_client, noun, query) in (200, 400)


@pytest.mark.parametrize(
    "lookup",
    [
        "attempted_errors__0__error__contains",
        "result__secret__startswith",
        "event__body__contains",
        "consumer__tasks__result__contains",
        "consumer__stream__name",
    ],
)
def test_a_lookup_that_no_page_links_to_is_refused(admin_client: Client, lookup: str):
    assert _status(admin_client, "task", f"{lookup}=x") == 400


@pytest.mark.parametrize("search", ["%", "_", "\\", "order_paid"])
def test_wildcards_of_sql_are_ordinary_letters(admin_client: Client, search: str):
    for noun in ("event", "task"):
        found = admin_client.get(page(f"{noun}_changelist"), {"q": search}).context["cl"]
        assert found.result_count == 0


@pytest.mark.parametrize("selected", ["abc", "\x00", "1 OR 1=1", "9" * 5_000])
def test_ticked_ids_that_are_none_are_refused(admin_client: Client, task: Task, selected: str):
    data = {"action": "cancel", "index": "0", "_selected_action": [task.pk, selected]}
    assert admin_client.post(page("task_changelist"), data).status_code == 400
    assert Task.objects.retryable().exists()


def test_a_ticked_id_beyond_every_id_is_of_no_task(admin_client: Client):
    data = {"action": "cancel", "index": "0", "_selected_action": ["9" * 30]}
    assert admin_client.post(page("task_changelist"), data).status_code == 302
    assert Task.objects.retryable().exists()


@pytest.mark.parametrize("action", ["\x00", "delete_selected", "__class__", "x" * 10_000])
def test_an_action_that_is_not_offered_is_refused(admin_client: Client, task: Task, action: str):
    data = {"action": action, "index": "0", "_selected_action": [task.pk]}
    assert admin_client.post(page("task_changelist"), data).status_code == 403


@pytest.mark.parametrize("index", ["-1", "5", "abc", ""])
def test_an_action_form_that_is_not_there_changes_nothing(
    admin_client: Client, task: Task, index: str
):
    data = {"action": ["", "cancel"], "index": index, "_selected_action": [task.pk]}
    assert admin_client.post(page("task_changelist"), data).status_code in (302, 200)


@pytest.mark.parametrize("noun", LISTS)
@pytest.mark.parametrize("key", ["abc", "%00", "9" * 40, "' OR 1=1"])
@pytest.mark.parametrize("view", ["change", "history", "delete"])
def test_the_page_of_a_row_that_is_not_there_leads_away(
    admin_client: Client, noun: str, key: str, view: str
):
    response = admin_client.get(f"{page(f'{noun}_changelist')}{key}/{view}/")
    assert response.status_code in (302, 403, 404)
    assert Event.objects.exists()
