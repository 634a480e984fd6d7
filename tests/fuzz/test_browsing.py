"""The admin's forms and addresses: a page, a form error or a refusal, never a crash."""

from typing import Any
from urllib.parse import urlencode

import pytest
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django.models import Schedule, Stream, Task, TaskState
from tests.admin.pages import page
from tests.admin.schedules import filled
from tests.factories import StreamFactory, TaskFactory
from tests.fuzz.adversarial import examples, mostly, typed
from tests.fuzz.doors import knocked
from tests.fuzz.targets.schedules import ENDS

LISTS = ("stream", "event", "consumer", "task", "worker", "schedule", "operatoraction")
PARAMETERS = (
    *(
        "q",
        "o",
        "p",
        "all",
        "e",
        "life",
        "stuck",
        "state",
        "_facets",
        "_popup",
        "_changelist_filters",
    ),
    *("state__exact", "state__in", "consumer__id__exact", "stream__id__exact", "event__id__exact"),
    *("id__in", "created_at__gte", "created_at__year", "subject__regex", "pk", "_to_field"),
)
FIELDS = ("name", "subject", "body", "metadata", "resource_key", "rrule", "dtstart", "exdates")
text = typed.map(lambda given: given[:2_000])


@pytest.fixture
def task(db: None) -> Task:
    retried: Task = TaskFactory.create(state=TaskState.RETRYABLE)
    return retried


@pytest.fixture
def stream(db: None) -> Stream:
    named: Stream = StreamFactory.create(name="reports")
    return named


@examples(80)
@given(
    noun=st.sampled_from(LISTS),
    query=st.dictionaries(
        st.sampled_from(PARAMETERS) | text, text | st.integers().map(str), max_size=3
    ),
)
def test_any_address_of_a_list_is_a_page_or_refused(
    admin_client: Client, task: Task, noun: str, query: dict[str, str]
):
    with knocked():
        address = f"{page(f'{noun}_changelist')}?{urlencode(query)}"
        assert admin_client.get(address, follow=True).status_code in (200, 400)


moments = st.datetimes().map(lambda moment: moment.isoformat(" ", "minutes"))
written: dict[str, st.SearchStrategy[str]] = {
    "name": text,
    "subject": text,
    "body": text,
    "metadata": text | st.sampled_from(('{"a": 1e999}', "NaN", '{"a": "\\ud800"}', "[" * 9_999)),
    "resource_key": text,
    "rrule": text | st.sampled_from(ENDS).map(lambda end: f"FREQ=HOURLY;UNTIL={end}"),
    "dtstart": text | moments,
    "timezone": text | st.sampled_from(("UTC", "America/St_Johns", "Pacific/Kiritimati")),
    "exdates": text | st.lists(moments, max_size=3).map("\r\n".join),
    "catchup": text,
    "stream": text,
}
changes = st.dictionaries(st.sampled_from(list(written)), st.just(None), max_size=2).flatmap(
    lambda chosen: st.fixed_dictionaries({name: written[name] for name in chosen})
)


@examples(20)
@given(change=changes, reason=mostly("", text))
def test_any_form_of_a_schedule_is_stored_whole_or_told_at_its_fields(
    admin_client: Client, stream: Stream, change: dict[str, Any], reason: str
):
    with knocked():
        data = filled(stream) | change | {"reason": reason}
        response = admin_client.post(page("schedule_add"), data)
        assert response.status_code in (200, 302)
        stored = Schedule.objects.first()
        assert (stored is None) == (response.status_code == 200)
        if stored is None:
            assert response.context["adminform"].form.errors
            return
        for address in (page("schedule_change", stored.pk), page("schedule_changelist")):
            assert admin_client.get(address).status_code == 200
        stored.delete()


@examples(40)
@given(verb=mostly("cancel", text), selected=st.lists(text, max_size=2), reason=text, index=text)
def test_any_action_is_carried_out_whole_or_refused(
    admin_client: Client,
    task: Task,
    verb: str,
    selected: list[str],
    reason: str,
    index: str,
):
    data = {
        "action": verb,
        "index": index,
        "reason": reason,
        "_selected_action": [*selected, str(task.pk)],
    }
    with knocked():
        status = admin_client.post(page("task_changelist"), data).status_code
        assert status in (200, 302, 400, 403)
        state = Task.objects.get(pk=task.pk).state
        assert state == TaskState.RETRYABLE or status == 302
        Task.objects.filter(pk=task.pk).update(state=TaskState.RETRYABLE, finalized_at=None)
