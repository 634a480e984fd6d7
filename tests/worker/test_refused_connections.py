"""What the project's own code may do to a connection that a handler is to be given."""

import threading
from typing import Any

import pytest
from django.db import DatabaseError, connection
from django.db.backends.signals import connection_created

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from tests.errors import Abort
from tests.worker.working import announce, wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("error", [ValueError("no such role"), Abort()])
def test_a_receiver_that_fails_on_a_new_connection_ends_no_handler_thread(error: BaseException):
    refused: list[str] = []

    @subscribe("work.>", stream="work", consumer="plain")
    def handle(message: Message) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        except DatabaseError:
            return

    def refuse(**_: Any) -> None:
        name = threading.current_thread().name
        if name.startswith("kanthorq-handler") and armed.is_set() and not refused:
            refused.append(name)
            raise error

    armed = threading.Event()
    connection_created.connect(refuse)
    try:
        with working("plain", concurrency=1):
            announce()
            wait_for_state(TaskState.COMPLETED)
            armed.set()
            announce()
            wait_for_state(TaskState.COMPLETED, 2)
    finally:
        connection_created.disconnect(refuse)
    assert refused
    assert not Task.objects.exclude(attempt_count=1).exists()
