from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from pytest_django import Settings

from kanthorq_django.admin.display import link, page_url
from kanthorq_django.admin.task import ERROR_SHOWN
from kanthorq_django.domain.failures import Failure
from kanthorq_django.models import Event, Task, TaskState
from tests.admin.pages import agree, page, press, text_of, texts_between
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db


def _listed(client: Client, **query: Any) -> list[Task]:
    response = client.get(page("task_changelist"), query)
    assert response.status_code == 200
    return list(response.context["cl"].result_list)


def _failure(attempt: int, error: str, stack: str = "") -> dict[str, object]:
    at = "2030-01-02T03:04:05+00:00"
    return {"at": at, "attempt": attempt, "verb": "handle", "error": error, "stack": stack}


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize(
    "at", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59+00:00"]
)
def test_a_failure_at_a_moment_that_no_clock_there_tells_is_shown(
    viewer: Client, settings: Settings, at: str, zone: str
):
    settings.TIME_ZONE = zone
    failure = _failure(1, "ValueError: no") | {"at": at}
    task = TaskFactory.create(state=TaskState.DISCARDED, attempted_errors=[failure])
    text = text_of(viewer.get(page("task_change", task.pk)))
    assert "ValueError: no" in text


def test_tasks_come_newest_first(viewer: Client):
    first, second = TaskFactory.create_batch(2)
    assert _listed(viewer) == [second, first]


def test_tasks_are_filtered_by_state_and_consumer(viewer: Client):
    wanted = TaskFactory.create(state=TaskState.DISCARDED)
    TaskFactory.create(state=TaskState.COMPLETED, consumer=wanted.consumer)
    TaskFactory.create(state=TaskState.DISCARDED)
    query = {"state__exact": -102, "consumer__id__exact": wanted.consumer_id}
    assert _listed(viewer, **query) == [wanted]


def test_a_consumer_that_is_gone_has_no_tasks_even_if_only_one_is_left(viewer: Client):
    task = TaskFactory.create()
    assert _listed(viewer, consumer__id__exact=task.consumer_id + 1) == []


def test_stuck_tasks_are_those_whose_lease_ran_out(viewer: Client):
    ago = timezone.now() - timedelta(minutes=1)
    stuck = TaskFactory.create(state=TaskState.RUNNING, schedule_at=ago)
    TaskFactory.create(state=TaskState.RUNNING)
    TaskFactory.create(state=TaskState.RETRYABLE, schedule_at=ago)
    assert _listed(viewer, stuck="yes") == [stuck]


def test_running_tasks_that_were_asked_to_stop_are_told_from_others_and_found(viewer: Client):
    now = timezone.now()
    later, ago = now + timedelta(minutes=5), now - timedelta(minutes=5)
    running = {"state": TaskState.RUNNING, "consumer__serialize": True}
    asked = TaskFactory.create(**running, cancel_requested_at=now, schedule_at=later)
    stuck = TaskFactory.create(
        **running, cancel_requested_at=now, schedule_at=ago, turn_key="order-1"
    )
    TaskFactory.create(**running, schedule_at=later)
    TaskFactory.create(state=TaskState.CANCELLED, cancel_requested_at=now)

    text = text_of(viewer.get(page("task_changelist")))

    assert text.count("Running, asked to stop order") == 1
    assert text.count("Running, asked to stop, stuck") == 1
    assert text.count("asked to stop") == 2 + 1  # and the filter
    assert _listed(viewer, asked="yes") == [stuck, asked]
    assert "Running, asked to stop" in text_of(viewer.get(page("task_change", asked.pk)))


def test_a_task_is_found_by_the_id_of_its_event(viewer: Client):
    wanted, _other = TaskFactory.create_batch(2)
    assert _listed(viewer, q=str(wanted.event_id)) == [wanted]
    assert _listed(viewer, q=wanted.event_id.hex.upper()) == [wanted]
    assert _listed(viewer, event__id__exact=wanted.event_id) == [wanted]


def test_tasks_are_found_by_the_beginning_of_their_subject(viewer: Client):
    wanted = TaskFactory.create(event__subject="order.paid.v2")
    TaskFactory.create(event__subject="refund.order.paid")
    assert _listed(viewer, q="order.pa") == [wanted]


def test_tasks_are_found_by_their_exact_resource_key(viewer: Client):
    wanted = TaskFactory.create(event__resource_key="order-17")
    TaskFactory.create(event__resource_key="order-170", event__subject="order.paid")
    assert _listed(viewer, q="order-17") == [wanted]


def test_a_resource_key_outranks_a_subject_that_begins_like_it(viewer: Client):
    wanted = TaskFactory.create(event__resource_key="order", event__subject="refund.made")
    TaskFactory.create(event__subject="order.paid")
    assert _listed(viewer, q="order") == [wanted]


def test_a_row_tells_the_state_the_attempts_and_the_newest_error(viewer: Client):
    TaskFactory.create(
        state=TaskState.RETRYABLE,
        attempt_count=3,
        event__subject="order.paid",
        consumer__name="emails",
        attempted_errors=[_failure(1, "TimeoutError"), _failure(2, "ValueError: <b>\u202e")],
    )
    text = text_of(viewer.get(page("task_changelist")))
    assert "Retryable order.paid ValueError: &lt;b&gt;\\u202e emails 3 / 16 due" in text
    assert "TimeoutError" not in text


def test_all_of_the_newest_error_is_the_tooltip_of_its_line_escaped_and_redacted(viewer: Client):
    error = f'ValueError: {"x" * ERROR_SHOWN} "><script> password=hunter2'
    TaskFactory.create(state=TaskState.DISCARDED, attempted_errors=[_failure(1, error)])

    html = viewer.get(page("task_changelist")).content.decode()

    told = f"ValueError: {'x' * ERROR_SHOWN} &quot;&gt;&lt;script&gt; password=[redacted]"
    line = f"ValueError: {'x' * ERROR_SHOWN}"[:ERROR_SHOWN]
    assert f'<div class="kq-newest-error" title="{told}">{line}</div>' in html
    assert "hunter2" not in html


@pytest.mark.parametrize(
    ("state", "minutes", "text"),
    [
        (TaskState.PENDING, 0, "once released"),
        (TaskState.AVAILABLE, -5, "due 5 minutes ago"),
        (TaskState.RETRYABLE, 5, "due 4 minutes from now"),
        (TaskState.RUNNING, 5, "lease ends 4 minutes from now"),
        (TaskState.RUNNING, -5, "Running, stuck"),
        (TaskState.RUNNING, -5, "lease ran out 5 minutes ago"),
        (TaskState.COMPLETED, 0, "ended now"),
    ],
)
def test_a_row_says_what_its_moment_means(
    viewer: Client, state: TaskState, minutes: int, text: str
):
    TaskFactory.create(state=state, schedule_at=timezone.now() + timedelta(minutes=minutes))
    shown = text_of(viewer.get(page("task_changelist"))).replace("\xa0", " ")
    assert text in shown


def test_errors_are_shown_newest_first_escaped_each_with_its_traceback(viewer: Client):
    failure = Failure.of(ValueError("<script>"), stack_size_max=1000)
    task = TaskFactory.create(
        state=TaskState.DISCARDED,
        attempted_errors=[
            _failure(1, "TimeoutError", "Traceback one"),
            _failure(2, failure.error, failure.stack),
        ],
    )
    html = viewer.get(page("task_change", task.pk)).content.decode()
    assert html.index("Attempt 2") < html.index("Attempt 1")
    assert html.count("<details") >= 2
    assert "ValueError: &lt;script&gt;" in html
    assert "<script>" not in html.replace("<script src", "")


@pytest.mark.parametrize(
    "stored",
    [
        *(["text"], [7], [None], [{}], "text", 7, {"error": "x"}),
        [{"at": "2030-99-99T00:00:00", "attempt": {}, "stack": ["x"]}],
    ],
)
def test_errors_of_any_shape_make_a_page(viewer: Client, stored: object):
    task = TaskFactory.create(state=TaskState.DISCARDED, attempted_errors=stored)
    assert viewer.get(page("task_change", task.pk)).status_code == 200
    assert viewer.get(page("task_changelist")).status_code == 200


def test_a_result_is_shown_as_json(viewer: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED, result={"sent": ["a", "b"]})
    html = viewer.get(page("task_change", task.pk)).content.decode()
    assert "{\n  &quot;sent&quot;: [\n    &quot;a&quot;,\n    &quot;b&quot;\n  ]\n}" in html


def test_attempts_at_a_cancellation_are_told_apart(viewer: Client):
    task = TaskFactory.create(state=TaskState.CANCELLING, cancel_attempt_count=2)
    text = text_of(viewer.get(page("task_change", task.pk)))
    assert "1 / 16, cancellation 2 / 16" in text


def test_a_page_leads_to_the_event_and_the_consumer(viewer: Client):
    task = TaskFactory.create()
    html = viewer.get(page("task_change", task.pk)).content.decode()
    assert page("event_change", task.event_id) in html
    assert page("consumer_change", task.consumer_id) in html


def test_a_task_whose_event_was_deleted_by_sql_is_shown_and_moved(operator: Client):
    task = TaskFactory.create(state=TaskState.DISCARDED, event__resource_key="order-17")
    Event.objects.filter(pk=task.event_id)._raw_delete("default")

    for lookup in ("", f"?q={task.event_id}", f"?event__id__exact={task.event_id}"):
        response = operator.get(page("task_changelist") + lookup)
        assert list(response.context["cl"].result_list) == [task]
        assert "the event was deleted order-17" in text_of(response)
    html = operator.get(page("task_change", task.pk)).content.decode()
    assert f"the event was deleted <code>{task.event_id}</code>" in html
    assert page("event_change", task.event_id) not in html
    assert operator.get(page("task_history", task.pk)).status_code == 200

    press(operator, "resume", task)
    task.refresh_from_db()
    assert task.state == TaskState.AVAILABLE


def test_a_page_that_the_project_does_not_have_is_not_linked_to():
    task = TaskFactory.create(consumer__name="emails")
    assert page_url("admin", "task_change", task.pk) == page("task_change", task.pk)
    assert page_url("admin", "no_such_page", task.pk) is None
    assert link(None, "<emails>") == "&lt;emails&gt;"


@pytest.mark.parametrize("verb", ["release", "reset"])
def test_the_history_tells_why_in_one_line(admin_client: Client, verb: str):
    state = {"release": TaskState.PENDING, "reset": TaskState.COMPLETED}[verb]
    task = TaskFactory.create(state=state)
    agree(admin_client, press(admin_client, verb, task, reason="a <b>\nbug"))
    text = text_of(admin_client.get(page("task_history", task.pk)))
    assert f"admin {verb} (was {state.label.lower()}): a &lt;b&gt; bug" in text


def test_the_history_tells_who_did_what(admin_client: Client):
    task = TaskFactory.create(state=TaskState.PENDING)
    admin_client.post(page("task_release", task.pk))
    text = text_of(admin_client.get(page("task_history", task.pk)))
    assert "admin release (was pending)" in text


def test_what_few_people_know_is_named_or_explained(viewer: Client):
    task = TaskFactory.create()
    shown = viewer.get(page("task_change", task.pk))
    turn_key, lease_epoch = texts_between(shown, "Turn key:", "Lease epoch:", "Created:")
    assert "—" in turn_key
    assert "one at a time" in turn_key
    assert " 0 " in lease_epoch
    assert "lease" in lease_epoch
    assert f"ID: {task.pk}" in text_of(shown)
