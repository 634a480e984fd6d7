"""An operator stops a running export; its files are removed, and the admin tells how it went."""

from pathlib import Path

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client

from kanthorq_django import publish
from kanthorq_django.models import Task, TaskState
from tests.admin.pages import agree, page, text_of, tick, told
from tests.concurrency import wait_until
from tests.processes import PATIENCE, runworker

pytestmark = pytest.mark.django_db(transaction=True)

CONSUMER = "export"
MAY = ("view_task", "view_consumer", "cancel_task")
STORY = (  # on the task's page, newest first
    "1 / 16, cancellation 3 / 10",
    "Cancellation attempt 2, ",
    "OSError: the disk is busy (2)",
    "Cancellation attempt 1, ",
    "OSError: the disk is busy (1)",
    " Attempt 1, ",
    "TaskCancelled: ",
)


@pytest.fixture
def operator() -> Client:
    user = User.objects.create(username="olu", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=MAY))
    client = Client()
    client.force_login(user)
    return client


def export_until_stopped(operator: Client, folder: Path) -> Task:
    """Let a worker export into ``folder``, stop it in the admin, and wait for its end."""
    event = publish("export.orders", {"folder": str(folder)}, stream="ledger")
    with runworker(CONSUMER):
        wait_until((folder / "part-2").exists, PATIENCE)
        running = Task.objects.get(event=event)
        answer = agree(operator, tick(operator, "cancel_running", [running]))
        counts = "0 tasks updated, 1 asked to stop."
        text = f"Cancel or stop: {counts} Changed, by event: {event.pk}"
        assert told(answer) == [("success", text)]
        wait_until(lambda: Task.objects.final().exists(), PATIENCE)
    return Task.objects.get(event=event)


def test_a_running_export_is_stopped_in_the_admin_and_cleaned_up(operator: Client, tmp_path: Path):
    task = export_until_stopped(operator, tmp_path)

    assert task.state == TaskState.CANCELLED
    assert list(tmp_path.iterdir()) == []
    story = text_of(operator.get(page("task_change", task.pk)))
    assert [text for text in STORY if text not in story] == []
    places = [story.index(text) for text in STORY]
    assert places == sorted(places)
    history = text_of(operator.get(page("task_history", task.pk)))
    assert "olu cancel (was running)" in history
    overview = text_of(operator.get(page("consumer_change", task.consumer_id)))
    assert "OSError: the disk is busy (1) 2 " in overview  # two attempts failed, for one reason
