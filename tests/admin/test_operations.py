import re

import pytest
from django.contrib.admin.models import LogEntry
from django.db import ProgrammingError, connection
from django.test import Client

from kanthorq_django.admin import operations
from kanthorq_django.admin.display import FEW
from kanthorq_django.domain import states
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.audit import SAMPLE_SIZE
from tests.admin.conftest import MakeClient
from tests.admin.pages import agree, page, press, tick, told
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = pytest.mark.django_db

VERBS = ("cancel", "resume", "release", "reset")
# A state that each verb leaves.
SOURCES = {
    "cancel": TaskState.AVAILABLE,
    "resume": TaskState.DISCARDED,
    "release": TaskState.PENDING,
    "reset": TaskState.COMPLETED,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", TaskState)
def test_each_action_moves_a_task_as_the_table_of_moves_says(
    operator: Client, verb: str, state: TaskState
):
    task = TaskFactory.create(state=state)
    expected = states.targets(verb, state)

    response = agree(operator, tick(operator, verb, [task]))

    task.refresh_from_db()
    assert response.status_code == 302
    assert task.state == (expected[0] if expected else state)
    assert [level for level, _ in told(response)] == ["success" if expected else "warning"]


def test_a_message_names_what_was_updated_and_what_was_left_alone(operator: Client):
    waiting = TaskFactory.create_batch(2, state=TaskState.AVAILABLE)
    running = TaskFactory.create(state=TaskState.RUNNING)

    response = tick(operator, "cancel", [*waiting, running])

    text = (
        f"Cancel: 2 tasks updated, 1 left alone. "
        f"Left alone, by event: {running.event_id} (Running) "
        f"Changed, by event: {waiting[0].event_id} {waiting[1].event_id}"
    )
    assert told(response) == [("warning", text)]


def test_a_message_names_only_a_few_of_many_tasks_left_alone(operator: Client):
    running = TaskFactory.create_batch(SAMPLE_SIZE + 2, state=TaskState.RUNNING)

    ((level, text),) = told(tick(operator, "cancel", running))

    assert level == "warning"
    assert text.startswith("Cancel: 0 tasks updated, 22 left alone. Left alone, by event: ")
    assert text.endswith(" and 2 others")
    assert len(re.findall(r"\(Running\)", text)) == SAMPLE_SIZE


def test_a_few_ids_are_shown_at_once_and_more_when_they_are_asked_for(operator: Client):
    waiting = TaskFactory.create_batch(FEW + 1, state=TaskState.AVAILABLE)
    running = TaskFactory.create_batch(FEW, state=TaskState.RUNNING)

    response = operator.get(tick(operator, "cancel", [*waiting, *running])["Location"])

    html = response.content.decode()
    assert '<details class="kq-disclosed" open><summary>Left alone, by event:</summary>' in html
    assert '<details class="kq-disclosed"><summary>Changed, by event:</summary>' in html
    assert [str(task.event_id) for task in waiting if str(task.event_id) not in html] == []
    assert re.search(r"Cancel: 4 tasks updated, 3 left alone\. +<details", html)


def test_running_tasks_are_cancelled_with_the_waiting_ones_by_an_action_of_its_own(
    operator: Client,
):
    waiting = TaskFactory.create(state=TaskState.AVAILABLE)
    running = TaskFactory.create(state=TaskState.RUNNING)
    completed = TaskFactory.create(state=TaskState.COMPLETED)

    response = agree(operator, tick(operator, "cancel_running", [waiting, running, completed]))

    (asked,) = Task.objects.filter(cancel_requested_at__isnull=False).exclude(pk=waiting.pk)
    assert (asked, asked.state) == (running, TaskState.RUNNING)
    assert Task.objects.get(pk=waiting.pk).state == TaskState.CANCELLED
    assert {entry.object_id for entry in LogEntry.objects.all()} == {
        str(waiting.pk),
        str(running.pk),
    }
    ((level, text),) = told(response)
    assert level == "warning"
    assert text.startswith("Cancel or stop: 1 task updated, 1 asked to stop, 1 left alone. ")
    assert f"Left alone, by event: {completed.event_id} (Completed) Changed, by event: " in text
    assert {str(waiting.event_id), str(running.event_id)} <= set(re.findall("[-0-9a-f]{36}", text))


def test_a_running_task_is_asked_to_stop_once(operator: Client):
    task = TaskFactory.create(state=TaskState.RUNNING)

    first, second = (agree(operator, tick(operator, "cancel_running", [task])) for _ in range(2))

    counts = "0 tasks updated, 1 asked to stop."
    text = f"Cancel or stop: {counts} Changed, by event: {task.event_id}"
    assert told(first) == [("success", text)]
    assert told(second)[-1][0] == "warning"
    assert LogEntry.objects.count() == 1


def test_a_button_stops_a_task_that_runs(operator: Client):
    task = TaskFactory.create(state=TaskState.RUNNING)
    button = f'formaction="{page("task_cancel_running", task.pk)}"'
    before = operator.get(page("task_change", task.pk)).content.decode()

    response = press(operator, "cancel_running", task)

    task.refresh_from_db()
    assert task.cancel_requested_at is not None
    assert told(response)[0][0] == "success"
    assert button in before
    assert button not in operator.get(page("task_change", task.pk)).content.decode()


def test_a_task_that_waits_has_one_button_to_cancel_it(operator: Client):
    task = TaskFactory.create(state=TaskState.AVAILABLE)
    shown = operator.get(page("task_change", task.pk)).content.decode()
    assert page("task_cancel", task.pk) in shown
    assert page("task_cancel_running", task.pk) not in shown


def test_a_report_tells_running_tasks_that_were_asked_to_stop():
    assert str(operations.Report(updated=1, requested=2)) == "1 task updated, 2 asked to stop."


def test_each_changed_task_is_logged_and_no_other(operator: Client):
    discarded = TaskFactory.create(state=TaskState.DISCARDED)
    cancelled = TaskFactory.create(state=TaskState.CANCELLED)
    running = TaskFactory.create(state=TaskState.RUNNING)

    tick(operator, "resume", [discarded, cancelled, running])

    logged = {entry.object_id: entry for entry in LogEntry.objects.all()}
    assert logged.keys() == {str(discarded.pk), str(cancelled.pk)}
    assert logged[str(discarded.pk)].change_message == "resume (was discarded)"
    assert logged[str(cancelled.pk)].change_message == "resume (was cancelled)"
    assert logged[str(cancelled.pk)].object_repr == str(cancelled)
    assert logged[str(cancelled.pk)].user.username == "staff-0"


def test_two_consumers_tasks_of_one_event_are_told_apart(operator: Client):
    event = EventFactory.create()
    kinds = {"consumer__stream": event.stream, "event": event}
    waiting = TaskFactory.create(**kinds, state=TaskState.AVAILABLE)
    running = TaskFactory.create(**kinds, state=TaskState.RUNNING)

    response = tick(operator, "cancel", [waiting, running])

    assert [entry.object_id for entry in LogEntry.objects.all()] == [str(waiting.pk)]
    assert "1 task updated, 1 left alone" in told(response)[0][1]


def test_a_change_that_cannot_be_logged_is_not_made(operator: Client):
    task = TaskFactory.create(state=TaskState.PENDING)
    with connection.cursor() as cursor:
        cursor.execute("""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
                AS $$ BEGIN RAISE EXCEPTION 'the log is full'; END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON django_admin_log
                FOR EACH ROW EXECUTE FUNCTION refuse();
        """)

    with pytest.raises(ProgrammingError, match="the log is full"):
        tick(operator, "release", [task])

    task.refresh_from_db()
    assert task.state == TaskState.PENDING


def test_a_task_with_a_cancellation_handler_goes_on_to_it(operator: Client):
    consumer = ConsumerFactory.create(has_cancel_handler=True)
    task = TaskFactory.create(consumer=consumer, state=TaskState.AVAILABLE)

    tick(operator, "cancel", [task])

    task.refresh_from_db()
    assert task.state == TaskState.CANCELLING


@pytest.mark.parametrize("verb", VERBS)
def test_a_button_on_the_tasks_page_does_what_the_action_does(operator: Client, verb: str):
    task = TaskFactory.create(state=SOURCES[verb])

    response = agree(operator, press(operator, verb, task))

    task.refresh_from_db()
    assert response.status_code == 302
    assert response["Location"] == page("task_change", task.pk)
    assert task.state == states.targets(verb, SOURCES[verb])[0]
    assert LogEntry.objects.get().object_id == str(task.pk)
    assert told(response)[0][0] == "success"


def test_a_button_pressed_too_late_warns(operator: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED)

    response = press(operator, "cancel", task)

    named = f"Left alone, by event: {task.event_id} (Completed)"
    assert told(response) == [("warning", f"Cancel: 0 tasks updated, 1 left alone. {named}")]


def test_a_button_leads_back_to_the_list_as_it_was_filtered(operator: Client):
    task = TaskFactory.create(state=TaskState.PENDING)
    query = "_changelist_filters=state__exact%3D0"

    response = operator.post(f"{page('task_release', task.pk)}?{query}")

    assert response["Location"] == f"{page('task_change', task.pk)}?{query}"


@pytest.mark.parametrize("task_id", ["0", "no-number", "9" * 40, "%00"])
def test_a_button_of_a_task_that_is_not_there_is_not_found(operator: Client, task_id: str):
    assert operator.post(f"{page('task_changelist')}{task_id}/cancel/").status_code == 404


def test_tasks_are_moved_batch_by_batch(operator: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operations, "BATCH_SIZE", 2)
    consumer = ConsumerFactory.create()
    tasks = TaskFactory.create_batch(5, state=TaskState.PENDING, consumer=consumer)

    response = tick(operator, "release", tasks)

    assert Task.objects.available().count() == 5
    assert LogEntry.objects.count() == 5
    changed = " ".join(str(task.event_id) for task in tasks)
    text = f"Release: 5 tasks updated. Changed, by event: {changed}"
    assert told(response) == [("success", text)]


def test_an_action_without_ticked_tasks_changes_nothing(operator: Client):
    TaskFactory.create(state=TaskState.PENDING)

    response = tick(operator, "release", [])

    assert Task.objects.pending().count() == 1
    assert told(response)[0][0] == "warning"


def test_an_action_reaches_only_what_the_list_is_filtered_to(operator: Client):
    ticked = TaskFactory.create(state=TaskState.PENDING)
    other = ConsumerFactory.create()

    operator.post(
        f"{page('task_changelist')}?consumer__id__exact={other.pk}",
        {"action": "release", "index": "0", "_selected_action": [ticked.pk]},
    )

    ticked.refresh_from_db()
    assert ticked.state == TaskState.PENDING


def test_every_verb_has_a_permission_of_its_own(client_of: MakeClient):
    for verb in VERBS:
        client = client_of(f"{verb}_task")
        response = client.get(page("task_changelist"))
        offered = {name for name, _ in response.context["action_form"].fields["action"].choices}
        assert offered - {""} == {verb} | ({"cancel_running"} if verb == "cancel" else set())


def test_many_are_told_with_separators():
    report = operations.Report(updated=79_944, requested=1, noop=1_000)
    assert str(report) == "79,944 tasks updated, 1 asked to stop, 1,000 left alone."
