"""What a connection is like before and after statements that were sent past its cursors."""

import os
import signal
from collections.abc import Iterator

import psycopg
import pytest
from django.db import InternalError, OperationalError, connection, transaction

from kanthorq_django import publish
from kanthorq_django.models import Event, Stream
from kanthorq_django.sql.round_trip import USES_BEFORE
from tests.announcements import forget_notifications, raw_connection
from tests.concurrency import DEADLINE_SECONDS, begin_elsewhere, wait_until

pytestmark = pytest.mark.django_db(transaction=True)

WAITING = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"


@pytest.fixture(autouse=True)
def known_connection() -> Iterator[None]:
    """Let the server keep what is published by, as it does for a worker and a busy publisher."""
    forget_notifications()
    connection.close()
    for _ in range(USES_BEFORE + 2):
        publish("order.created")
    yield
    connection.close()


def setting(name: str) -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting(%s)", [name])
        return str(cursor.fetchone()[0])


def test_a_transaction_that_begins_with_an_event_is_as_the_project_wants_it():
    raw = connection.connection
    raw.isolation_level, raw.deferrable = psycopg.IsolationLevel.REPEATABLE_READ, True
    with transaction.atomic():
        publish("order.created")
        assert setting("transaction_isolation") == "repeatable read"
        assert setting("transaction_deferrable") == "on"


def test_a_project_that_only_reads_publishes_nothing():
    connection.connection.read_only = True
    with pytest.raises(InternalError, match="read-only"), transaction.atomic():
        publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 2


def test_an_interrupted_publication_leaves_the_connection_usable():
    pid = connection.connection.info.backend_pid
    stream = Stream.objects.get().pk

    def interrupt() -> None:
        with connection.cursor() as watching:
            wait_until(lambda: watching.execute(WAITING, [pid]) or watching.rowcount)
        os.kill(os.getpid(), signal.SIGINT)

    with raw_connection() as other, other.transaction(force_rollback=True):
        other.execute(
            "INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata, "
            "resource_key, idempotency_key) "
            "VALUES (gen_random_uuid(), %s, 's', '', '{}', '', 'k')",
            [stream],
        )
        interrupting = begin_elsewhere(interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish("order.created", idempotency_key="k")
        interrupting.result(DEADLINE_SECONDS)

    assert connection.connection.info.backend_pid == pid
    publish("order.created", idempotency_key="k")
    with transaction.atomic():
        publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 4


def test_a_connection_that_is_lost_under_a_statement_is_replaced_by_the_next():
    pid = connection.connection.info.backend_pid
    with raw_connection() as other:
        other.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
    with pytest.raises(OperationalError):
        publish("order.created")
    connection.close_if_unusable_or_obsolete()
    publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 3
