"""At every door: a change whose record fails is not made, and neither stands without the other."""

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.contrib.auth.models import User
from django.test import Client

from kanthorq_django import publish, subscribe
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.models import (
    Consumer,
    Event,
    OperatorAction,
    Schedule,
    Stream,
    Task,
    TaskState,
)
from kanthorq_django.models.audit import Order
from tests.admin.pages import agree, page, press, tick
from tests.admin.schedules import filled, kept, shown_in
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

Door = Callable[[Client], object]


def _everything() -> list[list[tuple[Any, ...]]]:
    models = (Stream, Event, Consumer, Task, Schedule)
    return [list(model._base_manager.order_by("pk").values_list()) for model in models]


def _deletion(noun: str, row: Any) -> Door:
    return lambda client: client.post(page(f"{noun}_delete", row.pk), {"post": "yes"})


def _ticked_task() -> Door:
    task = TaskFactory.create()
    return lambda client: tick(client, "cancel", [task])


def _button_of_a_task() -> Door:
    task = TaskFactory.create(state=TaskState.DISCARDED)
    return lambda client: agree(client, press(client, "reset", task))


def _added_schedule() -> Door:
    stream = Stream.objects.create(name="s")
    return lambda client: client.post(page("schedule_add"), filled(stream))


def _changed_schedule() -> Door:
    row = kept()

    def change(client: Client) -> None:
        changed = shown_in(client, row) | {"subject": "report.other"}
        client.post(page("schedule_change", row.pk), changed)

    return change


def _button_of_a_schedule() -> Door:
    row = kept()
    return lambda client: client.post(page("schedule_cancel", row.pk))


def _ticked_schedules(action: str) -> Callable[[], Door]:
    def prepare() -> Door:
        data = {"action": action, "_selected_action": [str(kept().pk)], "post": "yes"}
        return lambda client: client.post(page("schedule_changelist"), data)

    return prepare


def _verb_of_tasks() -> Door:
    task = TaskFactory.create()
    return lambda _: kanthorq("tasks", "cancel", "--event", task.event_id, "--yes")


def _verb_of_schedules() -> Door:
    row = kept()
    return lambda _: kanthorq("schedules", "cancel", row.name, "--yes")


def _sync() -> Door:
    subscribe("a", consumer="new", stream="new")(lambda message: None)
    return lambda _: kanthorq("sync", "new")


def _prune() -> Door:
    task = TaskFactory.create(state=TaskState.COMPLETED)
    Consumer.objects.filter(pk=task.consumer_id).update(cursor="99999999:99999999:")
    return lambda _: kanthorq("prune", "--older-than", "0s", "--yes")


def _rebase() -> Door:
    EventFactory.create(stream=ConsumerFactory.create().stream)
    Consumer.objects.update(cluster_id=17)
    return lambda _: kanthorq("rebase", "--yes")


def _reencrypt() -> Door:
    publish("a", "x")
    return lambda _: kanthorq("reencrypt", "--yes")


# What each needs to be there before, and then the change.
DOORS: dict[str, Callable[[], Door]] = {
    "ticked task": _ticked_task,
    "button of a task": _button_of_a_task,
    "added schedule": _added_schedule,
    "changed schedule": _changed_schedule,
    "button of a schedule": _button_of_a_schedule,
    "ticked schedules": _ticked_schedules("cancel"),
    "deleted schedules": _ticked_schedules("delete_selected"),
    "deleted schedule": lambda: _deletion("schedule", kept()),
    "deleted event": lambda: _deletion("event", EventFactory.create()),
    "deleted consumer": lambda: _deletion("consumer", ConsumerFactory.create()),
    "tasks cancel": _verb_of_tasks,
    "schedules cancel": _verb_of_schedules,
    "publish": lambda: lambda _: kanthorq("publish", "a.b", "x"),
    "sync": _sync,
    "prune": _prune,
    "rebase": _rebase,
    "reencrypt": _reencrypt,
}


@pytest.fixture
def boss(transactional_db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))
    return client


@pytest.mark.parametrize("name", DOORS)
def test_a_change_whose_record_fails_is_not_made(
    boss: Client, declared: Registry, settings, monkeypatch, name: str
):
    door = DOORS[name]()
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    before, record = _everything(), Order.record

    def fail_after_it(self: Order, *args: Any, **kwargs: Any) -> None:
        record(self, *args, **kwargs)
        assert OperatorAction.objects.exists()
        raise RuntimeError("after the record")

    with monkeypatch.context() as patched:
        patched.setattr(Order, "record", fail_after_it)
        with pytest.raises(RuntimeError, match="after the record"):
            door(boss)
    assert not OperatorAction.objects.exists()
    assert _everything() == before
    door(boss)
    assert OperatorAction.objects.count() == 1
    assert _everything() != before
