import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client

from kanthorq_django.models import Task, TaskState
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, press, tick
from tests.factories import EventFactory, TaskFactory

pytestmark = pytest.mark.django_db

VERBS = ("cancel", "cancel_running", "resume", "release", "reset")
NOUNS = ("stream", "event", "consumer", "task", "worker")


def _unchanged(task: Task) -> bool:
    stored = Task.objects.get(pk=task.pk)
    is_same = (stored.state, stored.cancel_requested_at) == (task.state, task.cancel_requested_at)
    return is_same and not LogEntry.objects.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_get_on_an_operations_address_is_refused_and_changes_nothing(operator: Client, verb: str):
    task = TaskFactory.create(state=TaskState.PENDING)
    response = operator.get(page(f"task_{verb}", task.pk))
    assert response.status_code == 405
    assert _unchanged(task)


@pytest.mark.parametrize("verb", VERBS)
def test_a_button_without_a_csrf_token_is_refused(operator: Client, verb: str):
    task = TaskFactory.create(state=TaskState.PENDING)
    operator.handler.enforce_csrf_checks = True
    assert press(operator, verb, task).status_code == 403
    assert _unchanged(task)


def test_an_action_without_a_csrf_token_is_refused(operator: Client):
    task = TaskFactory.create(state=TaskState.PENDING)
    operator.handler.enforce_csrf_checks = True
    assert tick(operator, "release", [task]).status_code == 403
    assert _unchanged(task)


@pytest.mark.parametrize("verb", VERBS)
def test_a_viewer_who_posts_an_action_by_hand_is_refused(viewer: Client, verb: str):
    task = TaskFactory.create(state=TaskState.PENDING)
    assert tick(viewer, verb, [task]).status_code == 403
    assert _unchanged(task)


@pytest.mark.parametrize("verb", VERBS)
def test_a_viewer_who_posts_an_action_on_all_that_match_is_refused(viewer: Client, verb: str):
    task = TaskFactory.create(state=TaskState.PENDING)
    response = tick(
        viewer, verb, [task], select_across="1", confirmed="yes", through="9", after="0"
    )
    assert response.status_code == 403
    assert _unchanged(task)


@pytest.mark.parametrize("verb", VERBS)
def test_a_viewer_who_presses_a_button_by_hand_is_refused(viewer: Client, verb: str):
    task = TaskFactory.create(state=TaskState.PENDING)
    assert press(viewer, verb, task).status_code == 403
    assert _unchanged(task)


def test_one_verbs_permission_does_not_open_another_verb(client_of: MakeClient):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    client = client_of("resume_task")
    assert tick(client, "reset", [task]).status_code == 403
    assert press(client, "reset", task).status_code == 403
    assert _unchanged(task)


def test_who_may_not_cancel_cannot_stop_what_runs(client_of: MakeClient):
    task = TaskFactory.create(state=TaskState.RUNNING)
    client = client_of("resume_task", "release_task", "reset_task")
    assert tick(client, "cancel_running", [task]).status_code == 403
    assert press(client, "cancel_running", task).status_code == 403
    shown = client.get(page("task_change", task.pk)).content.decode()
    assert "cancel_running" not in shown
    assert _unchanged(task)


def test_who_may_cancel_but_not_see_tasks_can_do_neither(client_of: MakeClient):
    task = TaskFactory.create(state=TaskState.PENDING)
    client = client_of("cancel_task", views=())
    assert tick(client, "cancel", [task]).status_code == 403
    assert press(client, "cancel", task).status_code == 403
    assert _unchanged(task)


def test_a_viewer_sees_no_actions_and_no_buttons(viewer: Client):
    task = TaskFactory.create(state=TaskState.PENDING)
    listed = viewer.get(page("task_changelist"))
    shown = viewer.get(page("task_change", task.pk))
    assert listed.context["action_form"] is None
    assert b'name="action"' not in listed.content
    assert b"formaction" not in shown.content


def test_an_operator_sees_the_buttons_that_the_tasks_state_allows(operator: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    shown = operator.get(page("task_change", task.pk)).content.decode()
    assert f'formaction="{page("task_reset", task.pk)}"' in shown
    assert page("task_cancel", task.pk) not in shown


def test_an_anonymous_visitor_is_sent_to_the_login(client: Client):
    task = TaskFactory.create(state=TaskState.PENDING)
    response = press(client, "release", task)
    assert response.status_code == 302
    assert response["Location"].startswith("/admin/login/")
    assert _unchanged(task)


@pytest.mark.parametrize("noun", NOUNS)
def test_nothing_can_be_added_by_hand(admin_client: Client, noun: str):
    assert admin_client.get(page(f"{noun}_add")).status_code == 403
    assert admin_client.post(page(f"{noun}_add"), {}).status_code == 403


@pytest.mark.parametrize("noun", ["event", "task"])
def test_nothing_can_be_edited_by_hand(admin_client: Client, noun: str):
    task = TaskFactory.create(state=TaskState.RUNNING)
    row = task if noun == "task" else task.event
    response = admin_client.post(page(f"{noun}_change", row.pk), {"subject": "x", "state": "101"})
    assert response.status_code == 403
    assert _unchanged(task)


@pytest.mark.parametrize("noun", NOUNS)
def test_nothing_is_deleted_by_the_dozen(admin_client: Client, noun: str):
    event = EventFactory.create()
    response = admin_client.post(
        page(f"{noun}_changelist"),
        {"action": "delete_selected", "index": "0", "_selected_action": [event.pk], "post": "yes"},
    )
    assert response.status_code == 403


def test_a_task_cannot_be_deleted(admin_client: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    assert admin_client.post(page("task_delete", task.pk), {"post": "yes"}).status_code == 403
    assert _unchanged(task)


@pytest.mark.parametrize("noun", NOUNS)
def test_without_the_permission_to_view_there_is_no_page(client_of: MakeClient, noun: str):
    assert client_of(views=()).get(page(f"{noun}_changelist")).status_code == 403
