from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kanthorq_django import Fixed, subscribe
from kanthorq_django.admin import tally
from kanthorq_django.models import Consumer, Task, TaskState, Worker
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

pytestmark = pytest.mark.django_db


def _declare(name: str) -> None:
    @subscribe("order.>", consumer=name, atomic=True, retry=Fixed())
    def handle(message: Any) -> None:
        pass


def _work(*consumers: str, **given: Any) -> Worker:
    return Worker.objects.create(
        host="shop-1", pid=42, concurrency=10, consumers=list(consumers), **given
    )


def _stream(consumer: Consumer) -> str:
    return page("stream_change", consumer.stream_id)


def test_a_consumer_without_code_is_shown_as_orphaned(viewer: Client):
    _declare("emails")
    declared, orphan = ConsumerFactory.create(name="emails"), ConsumerFactory.create(name="fax")

    listed = text_of(viewer.get(page("consumer_changelist")))
    shown = text_of(viewer.get(page("consumer_change", declared.pk)))
    orphaned = text_of(viewer.get(page("consumer_change", orphan.pk)))

    assert "emails caught up — 0 " in listed
    assert "fax Orphaned caught up — 0 " in listed
    assert listed.count("Orphaned") == 1
    place = "tests.admin.test_consumer_pages._declare.&lt;locals&gt;.handle"
    assert f"In code: Declared {place}" in shown
    assert "No code in this process declares it" in orphaned
    assert "retry=Fixed(attempt_max=None, longest=" in shown
    assert "atomic=True batch=1 grouped=False" in shown
    assert "Options in code alone: —" in orphaned


def test_filters_lag_and_tasks_are_shown(viewer: Client):
    consumer = ConsumerFactory.create(
        name="emails", subject_includes=["order.>", "refund.*"], subject_excludes=["order.item.>"]
    )
    EventFactory.create_batch(2, stream=consumer.stream)
    TaskFactory.create_batch(2, consumer=consumer, state=TaskState.DISCARDED)
    TaskFactory.create(consumer=consumer, state=TaskState.COMPLETED)

    text = text_of(viewer.get(page("consumer_changelist")))

    assert "order.&gt; refund.* but not order.item.&gt;" in text
    assert "5 events, the oldest" in text
    assert "Discarded 2 Completed 1" in text


def test_one_unread_event_is_told_as_one(viewer: Client):
    EventFactory.create(stream=ConsumerFactory.create().stream)

    assert " 1 event, " in text_of(viewer.get(page("consumer_changelist")))


def test_a_running_task_whose_lease_ran_out_is_counted_as_stuck_too(viewer: Client):
    consumer = ConsumerFactory.create()
    ago = timezone.now() - timedelta(minutes=1)
    TaskFactory.create(consumer=consumer, state=TaskState.RUNNING, schedule_at=ago)
    TaskFactory.create(consumer=consumer, state=TaskState.RUNNING)
    assert "Stuck 1 Running 2" in text_of(viewer.get(page("consumer_change", consumer.pk)))


def test_a_count_leads_to_the_tasks_that_it_counts(viewer: Client):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    TaskFactory.create(consumer=task.consumer, state=TaskState.COMPLETED)
    query = f"?state__exact=-102&amp;consumer__id__exact={task.consumer_id}"
    address = f"{page('task_changelist')}{query}"
    assert address in viewer.get(page("consumer_changelist")).content.decode()
    listed = viewer.get(address.replace("&amp;", "&")).context["cl"]
    assert list(listed.result_list) == [task]


@pytest.mark.parametrize("state", TaskState)
def test_a_tally_counts_every_state(state: TaskState):
    consumer, other = ConsumerFactory.create_batch(2)
    TaskFactory.create_batch(3, consumer=consumer, state=state)
    TaskFactory.create(consumer=other, state=state)
    counts = tally.tally([consumer.pk, other.pk], "default")
    assert counts[consumer.pk].counts == {state: 3}
    assert counts[other.pk].counts == {state: 1}


@pytest.mark.parametrize(
    ("state", "shown"),
    [(TaskState.AVAILABLE, "2+"), (TaskState.PENDING, "2+"), (TaskState.CANCELLED, "2+")],
)
def test_a_tally_stops_counting_and_says_so(
    state: TaskState, shown: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tally, "COUNTED_MAX", 2)
    consumer = ConsumerFactory.create()
    TaskFactory.create_batch(3, consumer=consumer, state=state)
    assert str(tally.tally([consumer.pk], "default")[consumer.pk].counts[state]) == shown


def test_workers_that_are_alive_are_counted_for_each_consumer(viewer: Client):
    ConsumerFactory.create(name="emails")
    _work("emails", "refunds")
    _work("emails", seen_at=timezone.now() - timedelta(hours=1))

    listed = viewer.get(page("consumer_changelist"))

    assert "1 worker is alive and runs up to 10 handlers at a time." in text_of(listed)
    assert [row.worker_count for row in listed.context["cl"].result_list] == [1]


def test_a_list_without_a_living_worker_says_so(viewer: Client):
    assert "No worker is alive" in text_of(viewer.get(page("consumer_changelist")))


def test_an_orphan_is_deleted_with_its_tasks(client_of: MakeClient):
    task, other = TaskFactory.create(state=TaskState.PENDING), TaskFactory.create()
    client = client_of("delete_consumer")

    response = client.post(page("consumer_delete", task.consumer_id), {"post": "yes"})

    assert response.status_code == 302
    assert list(Consumer.objects.all()) == [other.consumer]
    assert list(Task.objects.all()) == [other]
    assert LogEntry.objects.get().object_id == str(task.consumer_id)


def test_a_question_about_an_orphan_tells_what_goes_with_it_and_what_may_come_back(
    client_of: MakeClient,
):
    consumer = ConsumerFactory.create()
    for state in TaskState:
        TaskFactory.create(consumer=consumer, state=state)

    text = text_of(client_of("delete_consumer").get(page("consumer_delete", consumer.pk)))

    assert "Consumers: 1 Tasks: 8" in text
    assert "5 of its 8 tasks are open" in text
    assert "A process whose code still declares it makes it anew" in text
    assert "from the beginning of the stream" in text


def test_a_question_about_many_tasks_says_that_it_stopped_counting(
    client_of: MakeClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kanthorq_django.admin.consumer.COUNT_MAX", 3)
    monkeypatch.setattr(tally, "COUNTED_MAX", 2)
    consumer = ConsumerFactory.create()
    TaskFactory.create_batch(5, consumer=consumer)
    text = text_of(client_of("delete_consumer").get(page("consumer_delete", consumer.pk)))
    assert "2+ of its 3+ tasks are open" in text


def test_a_question_about_an_orphan_does_not_load_its_tasks(client_of: MakeClient):
    consumer = ConsumerFactory.create()
    TaskFactory.create_batch(5, consumer=consumer)
    client = client_of("delete_consumer")
    with CaptureQueriesContext(connection) as queries:
        client.get(page("consumer_delete", consumer.pk))
    assert not [
        query["sql"]
        for query in queries
        if '"kanthorq_django_task"."attempted_errors"' in query["sql"]
    ]


def test_a_consumer_that_code_declares_cannot_be_deleted(admin_client: Client):
    _declare("emails")
    consumer = ConsumerFactory.create(name="emails")
    address = page("consumer_delete", consumer.pk)
    assert address not in admin_client.get(page("consumer_change", consumer.pk)).content.decode()
    assert admin_client.post(address, {"post": "yes"}).status_code == 403
    assert Consumer.objects.exists()


def test_a_consumer_that_a_living_worker_works_for_cannot_be_deleted(admin_client: Client):
    consumer = ConsumerFactory.create(name="fax")  # the shop declares "emails"
    _work("fax")
    response = admin_client.post(page("consumer_delete", consumer.pk), {"post": "yes"})
    assert response.status_code == 403
    assert Consumer.objects.exists()


def test_a_viewer_cannot_delete_an_orphan(viewer: Client):
    consumer = ConsumerFactory.create()
    response = viewer.post(page("consumer_delete", consumer.pk), {"post": "yes"})
    assert response.status_code == 403
    assert Consumer.objects.exists()


def test_consumers_are_filtered_by_the_stream_that_the_list_names(viewer: Client):
    wanted, _other = ConsumerFactory.create_batch(2)
    query = {"stream__id__exact": wanted.stream_id}

    unfiltered = viewer.get(page("consumer_changelist")).content.decode()
    filtered = viewer.get(page("consumer_changelist"), query).context["cl"]

    assert f'href="?stream__id__exact={wanted.stream_id}"' in unfiltered
    assert f'<td class="field-stream_link"><a href="{_stream(wanted)}">' in unfiltered
    assert list(filtered.result_list) == [wanted]


def test_options_say_yes_or_no_in_words(viewer: Client):
    consumer = ConsumerFactory.create(parked=True)
    shown = viewer.get(page("consumer_change", consumer.pk))
    assert "Parked: yes" in text_of(shown)
    assert "Has a cancellation handler: no" in text_of(shown)
    assert "<img" not in shown.content.decode()


def test_attempts_at_a_cancellation_are_told_where_there_is_a_handler_for_it(viewer: Client):
    silent = ConsumerFactory.create(cancel_attempt_max=7)
    handling = ConsumerFactory.create(cancel_attempt_max=7, has_cancel_handler=True)
    assert "Cancel attempt max" not in text_of(viewer.get(page("consumer_change", silent.pk)))
    assert "Cancel attempt max: 7" in text_of(viewer.get(page("consumer_change", handling.pk)))


def test_a_stream_tells_its_consumers_and_events(viewer: Client):
    consumer = ConsumerFactory.create(name="emails", stream=StreamFactory.create(name="orders"))
    EventFactory.create_batch(2, stream=consumer.stream)

    listed = text_of(viewer.get(page("stream_changelist")))
    shown = text_of(viewer.get(page("stream_change", consumer.stream_id)))

    assert "orders 1 now" in listed.replace("\xa0", " ")
    assert "Consumers: emails Events: 2" in shown


def test_a_worker_is_shown_as_alive_or_gone(viewer: Client):
    alive = _work("emails", "refunds")
    gone = _work(seen_at=timezone.now() - timedelta(hours=1))

    listed = text_of(viewer.get(page("worker_changelist")))
    filtered = viewer.get(page("worker_changelist"), {"life": "dead"}).context["cl"]
    others = viewer.get(page("worker_changelist"), {"life": "alive"}).context["cl"]

    assert "42@shop-1 Alive 10 emails, refunds" in listed
    assert "42@shop-1 Gone 10" in listed
    assert list(filtered.result_list) == [gone]
    assert list(others.result_list) == [alive]
    assert "Gone" in text_of(viewer.get(page("worker_change", gone.pk)))


def test_a_worker_of_many_consumers_names_a_few_in_the_list_and_all_on_its_page(viewer: Client):
    names = [f"consumer-{number}" for number in range(7)]
    worker = _work(*names)
    listed = text_of(viewer.get(page("worker_changelist")))
    assert "consumer-3, consumer-4 and 2 others" in listed
    assert ", ".join(names) in text_of(viewer.get(page("worker_change", worker.pk)))
