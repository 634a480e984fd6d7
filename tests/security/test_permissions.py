"""Each role against each action, by POST requests that no page offered."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
from django.test import Client

from kanthorq_django.models import OperatorAction, TaskState
from tests.admin.conftest import MakeClient, client_of
from tests.admin.pages import page
from tests.admin.schedules import filled, kept
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

__all__ = ["client_of"]  # a fixture

pytestmark = pytest.mark.django_db

NOUNS = ("stream", "event", "consumer", "task", "worker", "schedule", "operatoraction")
VIEWS = tuple(f"view_{noun}" for noun in NOUNS)
TASK_VERBS = ("cancel_task", "resume_task", "release_task", "reset_task")
SCHEDULE_VERBS = ("cancel_schedule", "resume_schedule")
EDITS = ("add_schedule", "change_schedule", "delete_schedule")
DELETES = ("delete_event", "delete_consumer")

# What people of each role have; a superuser needs none of it.
ROLES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "verbs without views": (*TASK_VERBS, *SCHEDULE_VERBS, *EDITS, *DELETES),
    "publisher": ("view_stream", "view_event", "add_event", "change_event"),
    "viewer": VIEWS,
    "viewer of bodies": (*VIEWS, "view_body"),
    "operator": (*VIEWS, *TASK_VERBS, *SCHEDULE_VERBS),
    "planner": (*VIEWS, *EDITS),
    "janitor": (*VIEWS, *DELETES),
}
EVERYTHING = {*VIEWS, *TASK_VERBS, *SCHEDULE_VERBS, *EDITS, *DELETES, "view_body"}

Post = Callable[[Client], Any]


def _buttons(verb: str, state: TaskState) -> Post:
    def post(client: Client) -> Any:
        pk = TaskFactory.create(state=state).pk
        beginning = dict.fromkeys(("after", "updated", "requested", "noop"), 0)
        return client.post(
            page(f"task_{verb}", pk), beginning | {"confirmed": "yes", "through": pk}
        )

    return post


def _listed(noun: str, action: str, row: Callable[[], Any]) -> Post:
    def post(client: Client) -> Any:
        data = {"action": action, "_selected_action": [str(row().pk)], "post": "yes"}
        return client.post(page(f"{noun}_changelist"), data)

    return post


def _schedule(verb: str) -> Post:
    return lambda client: client.post(page(f"schedule_{verb}", kept().pk), {"post": "yes"})


def _resume_schedule(client: Client) -> Any:
    row = kept()
    type(row).objects.filter(pk=row.pk).cancel()
    return client.post(page("schedule_resume", row.pk))


def _change_schedule(client: Client) -> Any:
    row = kept()
    return client.post(page("schedule_change", row.pk), filled(row.stream, subject="other.due"))


# The permissions that an action needs, all of them, and how it is asked for.
ACTIONS: dict[str, tuple[set[str], Post]] = {
    "cancel": ({"view_task", "cancel_task"}, _buttons("cancel", TaskState.AVAILABLE)),
    "stop": ({"view_task", "cancel_task"}, _buttons("cancel_running", TaskState.RUNNING)),
    "resume": ({"view_task", "resume_task"}, _buttons("resume", TaskState.DISCARDED)),
    "release": ({"view_task", "release_task"}, _buttons("release", TaskState.PENDING)),
    "reset": ({"view_task", "reset_task"}, _buttons("reset", TaskState.COMPLETED)),
    "cancel ticked": (
        {"view_task", "cancel_task"},
        _listed("task", "cancel", TaskFactory.create),
    ),
    "cancel schedule": ({"view_schedule", "cancel_schedule"}, _schedule("cancel")),
    "resume schedule": ({"view_schedule", "resume_schedule"}, _resume_schedule),
    "cancel ticked schedules": (
        {"view_schedule", "cancel_schedule"},
        _listed("schedule", "cancel", kept),
    ),
    "add schedule": (
        {"add_schedule"},
        lambda client: client.post(page("schedule_add"), filled(StreamFactory.create())),
    ),
    "change schedule": ({"change_schedule"}, _change_schedule),
    "delete schedule": ({"delete_schedule"}, _schedule("delete")),
    "delete ticked schedules": (
        {"view_schedule", "delete_schedule"},
        _listed("schedule", "delete_selected", kept),
    ),
    "delete event": (
        {"delete_event"},
        lambda client: client.post(page("event_delete", EventFactory.create().pk), {"post": "yes"}),
    ),
    "delete consumer": (
        {"delete_consumer"},
        lambda client: client.post(
            page("consumer_delete", ConsumerFactory.create().pk), {"post": "yes"}
        ),
    ),
}


def _with_implied(given: Collection[str]) -> set[str]:
    """Django lets those look who may change."""
    views = {name.replace("change_", "view_") for name in given if name.startswith("change_")}
    return {*given, *views}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("role", ROLES)
def test_a_role_can_do_what_it_has_the_permission_for_and_nothing_else(
    client_of: MakeClient, role: str, action: str
):
    needed, post = ACTIONS[action]
    given = ROLES[role]
    response = post(client_of(*given, views=()))
    is_allowed = needed <= _with_implied(given)
    assert (response.status_code == 302) == is_allowed
    assert is_allowed or response.status_code == 403
    assert OperatorAction.objects.exists() == is_allowed


@pytest.mark.parametrize("action", ACTIONS)
def test_a_superuser_can_do_all_of_it(admin_client: Client, action: str):
    assert ACTIONS[action][1](admin_client).status_code == 302
    assert OperatorAction.objects.count() == 1


@pytest.mark.parametrize("action", ACTIONS)
def test_a_visitor_and_a_customer_are_sent_to_the_login(
    client: Client, django_user_model: Any, action: str
):
    assert "/login/" in ACTIONS[action][1](client)["Location"]
    customer = django_user_model.objects.create(username="customer", is_superuser=True)
    client.force_login(customer)  # not of the staff
    TaskFactory.reset_sequence()
    assert "/login/" in client.post(page("task_changelist"), {"action": "cancel"})["Location"]
    assert not OperatorAction.objects.exists()


@pytest.mark.parametrize("missing", sorted(EVERYTHING))
def test_everything_but_one_permission_does_not_open_what_needs_it(
    client_of: MakeClient, missing: str
):
    client = client_of(*(EVERYTHING - {missing}), views=())
    for needed, post in ACTIONS.values():
        if not needed <= _with_implied(EVERYTHING - {missing}):
            assert post(client).status_code == 403


@pytest.mark.parametrize("noun", NOUNS)
@pytest.mark.parametrize("role", ROLES)
def test_a_role_sees_the_nouns_that_it_may_view(client_of: MakeClient, role: str, noun: str):
    given = set(ROLES[role])
    response = client_of(*given, views=()).get(page(f"{noun}_changelist"))
    assert (response.status_code == 200) == (f"view_{noun}" in _with_implied(given))


@pytest.mark.parametrize("role", ROLES)
def test_the_body_is_shown_to_those_who_may_see_bodies_alone(client_of: MakeClient, role: str):
    event = EventFactory.create(body="confidential")
    given = ROLES[role]
    response = client_of(*given, views=()).get(page("event_change", event.pk))
    assert (b"confidential" in response.content) == ("view_body" in given)
    assert (response.status_code == 200) == ("view_event" in given)


@pytest.mark.parametrize("guess", ["body__startswith", "body", "metadata__password", "xid__gt"])
def test_nobody_guesses_a_body_by_filtering_for_it(client_of: MakeClient, guess: str):
    EventFactory.create(body="confidential")
    client = client_of(*VIEWS, views=())
    response = client.get(page("event_changelist"), {guess: "c"})
    assert response.status_code in {302, 400}


ADDRESSES: dict[str, Callable[[], Any]] = {
    "schedule_cancel": kept,
    "schedule_resume": kept,
    "task_cancel": TaskFactory.create,
    "task_cancel_running": TaskFactory.create,
    "task_resume": TaskFactory.create,
    "task_release": TaskFactory.create,
    "task_reset": TaskFactory.create,
}


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("method", ["get", "head", "put", "delete", "patch", "options"])
def test_an_operations_address_takes_post_alone(admin_client: Client, name: str, method: str):
    row = ADDRESSES[name]()
    response = getattr(admin_client, method)(page(name, row.pk))
    assert response.status_code == 405
    assert response["Allow"] == "POST"
    assert not OperatorAction.objects.exists()


@pytest.mark.parametrize("action", ACTIONS)
def test_without_a_csrf_token_nothing_is_changed(admin_client: Client, action: str):
    admin_client.handler.enforce_csrf_checks = True
    assert ACTIONS[action][1](admin_client).status_code == 403
    assert not OperatorAction.objects.exists()


@pytest.mark.parametrize("noun", ["task", "schedule"])
def test_an_action_in_the_query_of_a_get_changes_nothing(admin_client: Client, noun: str):
    row = TaskFactory.create() if noun == "task" else kept()
    asked = {"action": "cancel", "_selected_action": str(row.pk), "select_across": "1"}
    assert admin_client.get(page(f"{noun}_changelist"), asked).status_code in {200, 302}
    assert not OperatorAction.objects.exists()
