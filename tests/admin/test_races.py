"""What operators are told when workers are faster."""

import threading
from typing import Any

import pytest
from django.db import transaction
from django.db.models.functions import Now
from django.test import Client

from kanthorq_django import publish
from kanthorq_django.admin import schedule_actions
from kanthorq_django.models import Consumer, OperatorAction, Schedule, Task, TaskState
from kanthorq_django.models.registration import Registration
from kanthorq_django.models.schedule import ScheduleQuerySet
from tests.admin.conftest import MakeClient
from tests.admin.pages import answer, ask_for_all, page, tick, told
from tests.admin.schedules import kept, shown_in
from tests.concurrency import (
    DEADLINE_SECONDS,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_task_that_is_claimed_meanwhile_is_told_as_running(operator: Client):
    task = TaskFactory.create(state=TaskState.AVAILABLE)
    claimed = threading.Event()

    def claim() -> None:
        with transaction.atomic():
            Task.objects.filter(pk=task.pk).update(state=TaskState.RUNNING)
            claimed.set()
            wait_until(is_waited_for)

    claiming = begin_elsewhere(claim)
    claimed.wait(DEADLINE_SECONDS)
    response = tick(operator, "cancel", [task])
    claiming.result(DEADLINE_SECONDS)

    named = f"Left alone, by event: {task.event_id} (Running)"
    assert told(response) == [("warning", f"Cancel: 0 tasks updated, 1 left alone. {named}")]


def test_what_left_the_filter_before_the_verb_came_to_it_is_left_alone(operator: Client):
    held, moved = TaskFactory.create_batch(2, state=TaskState.DISCARDED)
    query = f"?state__exact={TaskState.DISCARDED.value}"
    asked = ask_for_all(operator, "reset", query)
    with transaction.atomic():
        assert Task.objects.select_for_update().get(pk=held.pk)
        resetting = begin_elsewhere(lambda: answer(operator, asked, query))
        wait_until(is_waited_for)
        finished = {"state": TaskState.COMPLETED, "finalized_at": Now()}
        elsewhere(lambda: Task.objects.filter(pk=moved.pk).update(**finished))
    response = resetting.result(DEADLINE_SECONDS)
    assert "1 task updated, 1 left alone" in told(response)[0][1]
    moved.refresh_from_db()
    assert moved.state == TaskState.COMPLETED


def test_no_consumer_joins_a_stream_whose_event_is_being_deleted(client_of: MakeClient):
    def join() -> list[Task]:
        return Consumer.objects.register("newcomer", Registration("orders", [">"])).pull()

    event = publish("order.paid", stream="orders")
    client = client_of("delete_event")
    with transaction.atomic():
        response = client.post(page("event_delete", event.pk), {"post": "yes"})
        joining = begin_elsewhere(join)
        wait_until(lambda: is_waited_for() or joining.done())
    assert response.status_code == 302
    assert joining.result(DEADLINE_SECONDS) == []


def do_to_all_schedules(client: Client, verb: str, query: str = "") -> Any:
    ticked = Schedule.objects.values_list("pk", flat=True).first()
    data = {"action": verb, "select_across": "1", "_selected_action": [str(ticked)], "post": "yes"}
    return client.post(page("schedule_changelist") + query, data)


def test_a_schedule_that_is_added_meanwhile_is_not_deleted_with_all_that_match(
    admin_client: Client, monkeypatch: pytest.MonkeyPatch
):
    def delete_once_there_is_another(self: ScheduleQuerySet) -> Any:
        elsewhere(lambda: kept("newcomer"))
        return super(ScheduleQuerySet, self).delete()

    kept("report")
    monkeypatch.setattr(ScheduleQuerySet, "delete", delete_once_there_is_another)
    do_to_all_schedules(admin_client, "delete_selected")

    assert Schedule.objects.get().name == "newcomer"
    recorded = OperatorAction.objects.get()
    assert (recorded.counts, recorded.sample) == ({"deleted": 1}, ["report"])


def test_a_schedule_that_is_added_meanwhile_is_not_cancelled_with_all_that_match(
    admin_client: Client, monkeypatch: pytest.MonkeyPatch
):
    def cancel_once_there_is_another(schedules: ScheduleQuerySet) -> Any:
        elsewhere(lambda: kept("newcomer"))
        return schedules.cancel()

    kept("report")
    slow = schedule_actions.CANCEL._replace(apply=cancel_once_there_is_another)
    monkeypatch.setattr(schedule_actions, "CANCEL", slow)
    response = do_to_all_schedules(admin_client, "cancel")

    assert "1 schedule updated." in told(response)[0][1]
    assert Schedule.objects.get(cancelled_at=None).name == "newcomer"
    assert OperatorAction.objects.get().sample == ["report"]


def test_a_schedule_that_left_the_filter_meanwhile_is_not_deleted(admin_client: Client):
    held = kept("report")
    with transaction.atomic():
        assert Schedule.objects.select_for_update().get(pk=held.pk)
        deleting = begin_elsewhere(
            lambda: do_to_all_schedules(admin_client, "delete_selected", "?q=report.due")
        )
        wait_until(is_waited_for)
        Schedule.objects.filter(pk=held.pk).update(subject="parcel.sent")
    deleting.result(DEADLINE_SECONDS)
    assert Schedule.objects.get() == held


def test_a_schedule_that_is_deleted_while_it_is_changed_is_not_found(admin_client: Client):
    row = kept()
    given = shown_in(admin_client, row) | {"subject": "report.other"}
    with transaction.atomic():
        Schedule.objects.filter(pk=row.pk).delete()
        changing = begin_elsewhere(
            lambda: admin_client.post(page("schedule_change", row.pk), given)
        )
        wait_until(is_waited_for)
    assert changing.result(DEADLINE_SECONDS).status_code == 404
    assert not OperatorAction.objects.exists()
