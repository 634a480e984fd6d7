import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.utils import timezone

from kanthorq_django.admin import confirmation, operations
from kanthorq_django.models import Consumer, OperatorAction, Task, TaskState
from tests.admin.pages import agree, answer, ask_for_all, page, press, text_of, tick, told
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db


@pytest.fixture
def consumer(db: None) -> Consumer:
    return ConsumerFactory.create(name="emails")


def test_all_that_match_are_asked_for_before_anything_changes(operator: Client, consumer: Consumer):
    TaskFactory.create_batch(2, state=TaskState.DISCARDED, consumer=consumer)
    TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)

    asked = ask_for_all(operator, "resume")

    assert asked.status_code == 200
    assert "3 tasks match" in text_of(asked)
    assert "emails Discarded 2 Resume" in text_of(asked)
    assert "emails Running 1 Left alone" in text_of(asked)
    assert Task.objects.discarded().count() == 2
    assert not LogEntry.objects.exists()


def test_the_answer_moves_all_that_match_and_nothing_else(operator: Client, consumer: Consumer):
    TaskFactory.create_batch(3, state=TaskState.DISCARDED, consumer=consumer)
    TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)
    other = TaskFactory.create(state=TaskState.DISCARDED)
    query = f"?consumer__id__exact={consumer.pk}"

    response = answer(operator, ask_for_all(operator, "resume", query), query)

    assert response.status_code == 302
    assert Task.objects.filter(consumer=consumer, state=TaskState.AVAILABLE).count() == 3
    other.refresh_from_db()
    assert other.state == TaskState.DISCARDED
    assert LogEntry.objects.count() == 3
    assert told(response)[0][0] == "warning"
    assert "3 tasks updated, 1 left alone" in told(response)[0][1]


def test_what_runs_is_asked_for_and_stopped_with_all_that_match(
    operator: Client, consumer: Consumer
):
    TaskFactory.create_batch(2, state=TaskState.AVAILABLE, consumer=consumer)
    TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)
    TaskFactory.create(
        state=TaskState.RUNNING, consumer=consumer, cancel_requested_at=timezone.now()
    )

    asked = ask_for_all(operator, "cancel_running")
    forecast = text_of(asked)
    response = answer(operator, asked)

    assert "emails Available 2 Cancel emails" in forecast
    assert "emails Running 1 Asked to stop emails Running 1 Left alone" in forecast
    assert Task.objects.cancelled().count() == 2
    assert Task.objects.running().filter(cancel_requested_at=None).count() == 0
    assert "2 tasks updated, 1 asked to stop, 1 left alone" in told(response)[0][1]


def test_a_filter_by_the_state_that_the_verb_leaves_still_reaches_all(
    operator: Client, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(operations, "BATCH_SIZE", 2)
    TaskFactory.create_batch(5, state=TaskState.PENDING, consumer=consumer)

    response = answer(
        operator, ask_for_all(operator, "release", "?state__exact=0"), "?state__exact=0"
    )

    ((level, text),) = told(response)
    assert level == "success"
    assert text.startswith("Release: 5 tasks updated. Changed, by event: ")
    assert Task.objects.available().count() == 5


def test_a_long_operation_is_done_in_several_requests(
    operator: Client, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(operations, "BATCH_SIZE", 2)
    monkeypatch.setattr(confirmation, "SECONDS_MAX", 0.0)
    TaskFactory.create_batch(4, state=TaskState.PENDING, consumer=consumer)
    TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)

    response = ask_for_all(operator, "release")
    done = []
    while response.status_code == 200:
        response = answer(operator, response)
        done.append(Task.objects.available().count())

    assert done == [2, 4, 4]
    assert "4 tasks updated, 1 left alone" in told(response)[0][1]


def test_each_step_tells_what_was_done_so_far(
    operator: Client, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(operations, "BATCH_SIZE", 2)
    monkeypatch.setattr(confirmation, "SECONDS_MAX", 0.0)
    TaskFactory.create_batch(3, state=TaskState.PENDING, consumer=consumer)

    step = answer(operator, ask_for_all(operator, "release"))

    first, second, _third = Task.objects.order_by("pk")
    text = text_of(step)
    assert "So far: 2 tasks updated. There are more; each step" in text
    assert f"Changed, by event: {first.event_id} {second.event_id}" in text


def test_tasks_that_came_after_the_question_are_left_alone(operator: Client, consumer: Consumer):
    TaskFactory.create(state=TaskState.PENDING, consumer=consumer)
    asked = ask_for_all(operator, "release")
    late = TaskFactory.create(state=TaskState.PENDING, consumer=consumer)

    answer(operator, asked)

    late.refresh_from_db()
    assert late.state == TaskState.PENDING


@pytest.mark.parametrize("through", ["", "-1", "x", "1" * 5000])
def test_a_forged_answer_changes_nothing(operator: Client, consumer: Consumer, through: str):
    TaskFactory.create(state=TaskState.PENDING, consumer=consumer)
    asked = ask_for_all(operator, "release")
    assert answer(operator, asked, through=through).status_code == 400
    assert Task.objects.pending().count() == 1


def test_a_forecast_reads_a_bounded_number_of_tasks(
    operator: Client, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(confirmation, "COUNT_MAX", 3)
    TaskFactory.create_batch(5, state=TaskState.PENDING, consumer=consumer)

    asked = text_of(ask_for_all(operator, "release"))

    assert "At least 3 tasks match" in asked
    assert "emails Pending 3 Release" in asked


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        ("cancel", TaskState.AVAILABLE),
        ("resume", TaskState.DISCARDED),
        ("release", TaskState.PENDING),
    ],
)
def test_ticked_tasks_are_moved_at_once_where_that_can_be_taken_back(
    operator: Client, consumer: Consumer, verb: str, state: TaskState
):
    task = TaskFactory.create(state=state, consumer=consumer)
    assert tick(operator, verb, [task], select_across="0").status_code == 302
    assert not Task.objects.filter(state=state).exists()


def test_a_reset_of_ticked_tasks_is_asked_for_with_what_is_lost(
    operator: Client, consumer: Consumer
):
    done = TaskFactory.create_batch(2, state=TaskState.COMPLETED, consumer=consumer)
    running = TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)
    TaskFactory.create(state=TaskState.COMPLETED, consumer=consumer)

    asked = tick(operator, "reset", [*done, running], reason="a bug")

    text = text_of(asked)
    assert asked.status_code == 200
    assert "This is about 3 tasks. Final tasks run again at once" in text
    assert "What is forgotten is lost for good." in text
    assert "such as a payment, they do once more." in text
    assert "emails Completed 2 Reset emails Running 1 Left alone" in text
    assert f"By event: {done[0].event_id} {done[1].event_id} {running.event_id}" in text
    assert 'value="Reset these 3 tasks"' in asked.content.decode()
    assert Task.objects.completed().count() == 3
    assert not LogEntry.objects.exists()


def test_the_answer_resets_the_ticked_tasks_alone(operator: Client, consumer: Consumer):
    ticked = TaskFactory.create_batch(2, state=TaskState.COMPLETED, consumer=consumer)
    other = TaskFactory.create(state=TaskState.COMPLETED, consumer=consumer)

    response = agree(operator, tick(operator, "reset", ticked, reason="a bug"))

    assert response.status_code == 302
    assert list(Task.objects.completed()) == [other]
    assert "Reset: 2 tasks updated." in told(response)[0][1]
    order = OperatorAction.objects.get()
    assert order.selection == {"ticked": [str(task.pk) for task in ticked]}
    assert order.reason == "a bug"


def test_stopping_ticked_tasks_is_asked_for(operator: Client, consumer: Consumer):
    running = TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)

    asked = tick(operator, "cancel_running", [running])

    assert asked.status_code == 200
    assert "emails Running 1 Asked to stop" in text_of(asked)
    assert not Task.objects.filter(cancel_requested_at__isnull=False).exists()


def test_the_button_that_resets_asks_first_and_leads_back_to_the_task(
    operator: Client, consumer: Consumer
):
    task = TaskFactory.create(state=TaskState.COMPLETED, consumer=consumer, result={"paid": 5})

    asked = operator.post(f"{page('task_reset', task.pk)}?_changelist_filters=q%3Dx")

    assert asked.status_code == 200
    assert "This is about 1 task." in text_of(asked)
    assert "emails Completed 1 Reset" in text_of(asked)
    back = f"{page('task_change', task.pk)}?_changelist_filters=q%3Dx"
    assert f'<a href="{back}" class="button cancel-link">' in asked.content.decode()
    task.refresh_from_db()
    assert task.result == {"paid": 5}

    assert agree(operator, asked)["Location"] == back
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.AVAILABLE, None)


def test_a_confirmation_of_a_button_that_no_page_sent_is_refused(operator: Client):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    forged = operator.post(page("task_reset", task.pk), {"confirmed": "yes"})
    assert forged.status_code == 400
    assert Task.objects.completed().exists()


def test_the_button_that_stops_one_task_acts_at_once(operator: Client):
    task = TaskFactory.create(state=TaskState.RUNNING)
    assert press(operator, "cancel_running", task).status_code == 302


def test_a_search_means_at_the_answer_what_it_meant_at_the_question(operator: Client):
    others = TaskFactory.create_batch(
        2, state=TaskState.COMPLETED, finalized_at=timezone.now(), event__subject="order.paid"
    )
    keyed = TaskFactory.create(
        state=TaskState.COMPLETED, finalized_at=timezone.now(), resource_key="order"
    )
    query = "?q=order"
    asked = ask_for_all(operator, "reset", query)
    assert "1 task matches" in text_of(asked)

    keyed.delete()
    answered = answer(operator, asked, query)

    assert "0 tasks updated" in str(told(answered))
    assert Task.objects.completed().count() == len(others)


def test_a_search_keeps_its_meaning_through_all_requests(
    operator: Client, monkeypatch: pytest.MonkeyPatch
):
    TaskFactory.create_batch(3, state=TaskState.AVAILABLE, event__subject="order.paid")
    monkeypatch.setattr(operations, "BATCH_SIZE", 1)
    monkeypatch.setattr(confirmation, "SECONDS_MAX", 0.0)
    query = "?q=order"

    response = ask_for_all(operator, "cancel", query)
    TaskFactory.create(state=TaskState.AVAILABLE, resource_key="order")
    while response.status_code == 200:
        response = answer(operator, response, query)

    assert Task.objects.cancelled().count() == 3
