"""What operators are told when workers are faster."""

import threading
import time

import pytest
from django.db import connection, transaction
from django.test import Client

from kanthorq_django.models import Task, TaskState
from tests.admin.pages import tick, told
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

DEADLINE_SECONDS = 30


def _wait_for_a_blocked_statement() -> None:
    deadline, pause = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while time.monotonic() < deadline:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT 1 FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if cursor.fetchone():
                return
        pause.wait(0.01)
    raise AssertionError("Nobody waited for the claimed row.")


def test_a_task_that_is_claimed_meanwhile_is_told_as_running(operator: Client):
    task = TaskFactory.create(state=TaskState.AVAILABLE)
    claimed = threading.Event()

    def claim() -> None:
        try:
            with transaction.atomic():
                Task.objects.filter(pk=task.pk).update(state=TaskState.RUNNING)
                claimed.set()
                _wait_for_a_blocked_statement()
        finally:
            connection.close()

    worker = threading.Thread(target=claim)
    worker.start()
    claimed.wait(DEADLINE_SECONDS)
    response = tick(operator, "cancel", [task])
    worker.join(DEADLINE_SECONDS)

    named = f"Left alone, by event: {task.event_id} (Running)"
    assert told(response) == [("warning", f"Cancel: 0 tasks updated, 1 left alone. {named}")]
