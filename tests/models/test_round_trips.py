"""What a connection is like before and after statements that were sent past its cursors."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from django.db import (
    DatabaseError,
    IntegrityError,
    InternalError,
    NotSupportedError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError

from kanthorq_django import publish, publish_many, sql, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Stream, Task, TaskState
from kanthorq_django.models.publishing import notifications
from kanthorq_django.sql import round_trip
from kanthorq_django.sql.binding import Statement
from kanthorq_django.sql.result import rows_of
from kanthorq_django.sql.session import USES_BEFORE
from kanthorq_django.testing import drain
from tests.announcements import forget_notifications, raw_connection
from tests.concurrency import DEADLINE_SECONDS, begin_elsewhere, elsewhere, wait_until
from tests.factories import ConsumerFactory

pytestmark = pytest.mark.django_db(transaction=True)

WAITING = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"


@pytest.fixture(autouse=True)
def known_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the server keep what is published by, as it does for a worker and a busy publisher."""
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 3600)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    connection.close()
    for _ in range(USES_BEFORE + 2):
        publish("order.created")
    yield
    connection.close()


def setting(name: str) -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting(%s)", [name])
        return str(cursor.fetchone()[0])


def test_a_begin_of_ours_is_not_taken_for_the_one_that_psycopg_would_send():
    connection.connection.autocommit = False  # past Django
    begin, asked = sql.BEGIN_READ_COMMITTED, Statement("SELECT 7;", is_repeated=True)
    _, seven, _ = round_trip.run(connection, (begin, asked, sql.COMMIT), {})
    assert rows_of(seven, connection) == [(7,)]


def test_a_transaction_that_begins_with_an_event_is_as_the_project_wants_it():
    raw = connection.connection
    raw.isolation_level, raw.deferrable = psycopg.IsolationLevel.REPEATABLE_READ, True
    with transaction.atomic():
        publish("order.created")
        assert setting("transaction_isolation") == "repeatable read"
        assert setting("transaction_deferrable") == "on"


def test_a_project_that_writes_where_others_may_only_read_publishes():
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
    connection.connection.read_only = False
    with transaction.atomic():
        published = publish("order.created")
    assert Event.objects.filter(pk=published.pk).exists()


def test_a_project_that_only_reads_publishes_nothing():
    connection.connection.read_only = True
    with pytest.raises(InternalError, match="read-only"), transaction.atomic():
        publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 2


class TimeIsUp(Exception):
    """What the handler of a signal raises, as some servers do to requests that take long."""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, which it does not in what a shell runs behind it."""

    def expire(*_: object) -> None:
        raise TimeIsUp

    former = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGALRM: signal.signal(signal.SIGALRM, expire),
    }
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def interrupted_while_it_waits(number: signal.Signals) -> Iterator[None]:
    """Send a signal once the connection waits for another publisher of the key ``"k"``."""
    pid = connection.connection.info.backend_pid
    stream = Stream.objects.get().pk

    def interrupt() -> None:
        with connection.cursor() as watching:
            wait_until(lambda: watching.execute(WAITING, [pid]) or watching.rowcount)
        os.kill(os.getpid(), number)

    with raw_connection() as other, other.transaction(force_rollback=True):
        other.execute(
            "INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata, "
            "resource_key, idempotency_key) "
            "VALUES (gen_random_uuid(), %s, 's', '', '{}', '', 'k')",
            [stream],
        )
        interrupting = begin_elsewhere(interrupt)
        yield
        interrupting.result(DEADLINE_SECONDS)


def test_an_interrupted_publication_leaves_the_connection_usable(interruptible: None):
    pid = connection.connection.info.backend_pid
    with interrupted_while_it_waits(signal.SIGINT), pytest.raises(KeyboardInterrupt):
        publish("order.created", idempotency_key="k")

    assert connection.connection.info.backend_pid == pid
    publish("order.created", idempotency_key="k")
    with transaction.atomic():
        publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 4


def test_a_connection_whose_answer_was_not_awaited_is_closed(interruptible: None):
    with interrupted_while_it_waits(signal.SIGALRM), pytest.raises(TimeIsUp):
        publish("order.created", idempotency_key="k")

    assert connection.connection.closed  # or the next statement would be told what this one is
    connection.close_if_unusable_or_obsolete()  # as at the end of a request
    publish("order.created", idempotency_key="k")  # whether it was inserted after all or not
    assert Event.objects.filter(idempotency_key="k").count() == 1


def test_an_interrupted_notification_is_no_success(monkeypatch: pytest.MonkeyPatch):
    run_apart = sql.run_apart  # type: ignore[attr-defined]

    def interrupted(*given: Any) -> Any:
        run_apart(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(notifications, "LONE_AFTER", -1)
    monkeypatch.setattr(sql, "run_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish("order.created")


@pytest.mark.parametrize("lone_after", [3600, -1])
def test_a_connection_that_is_lost_says_why_and_is_replaced_by_the_next(
    monkeypatch: pytest.MonkeyPatch, lone_after: float
):
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    publish("order.created")
    end_connection()
    with pytest.raises(OperationalError, match="terminating connection") as raised:
        publish("order.created")
    assert isinstance(raised.value.__cause__, psycopg.errors.AdminShutdown)
    connection.close_if_unusable_or_obsolete()
    publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 4


@pytest.mark.parametrize("lone_after", [3600, -1])
def test_a_connection_that_died_between_two_requests_is_replaced(
    monkeypatch: pytest.MonkeyPatch, lone_after: float
):
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    end_connection()
    monkeypatch.setattr(connections["default"], "health_check_enabled", True)
    monkeypatch.setattr(connections["default"], "health_check_done", False)
    with monkeypatch.context() as patch:
        patch.setattr(DatabaseWrapper, "get_new_connection", refuse)
        with pytest.raises(OperationalError, match="nobody is there"):
            publish("order.created")
    publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 3


@pytest.mark.parametrize("lone_after", [3600, -1])
def test_an_error_that_comes_with_the_commit_is_djangos(
    monkeypatch: pytest.MonkeyPatch, lone_after: float
):
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    pid = connection.connection.info.backend_pid
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE 'not this one' USING ERRCODE = '23514'; END $$;"
            "CREATE CONSTRAINT TRIGGER refusing AFTER INSERT ON kanthorq_django_event "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    try:
        with pytest.raises(IntegrityError, match="not this one"):
            publish("order.created")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION refuse CASCADE")
    publish("order.created")
    assert connection.connection.info.backend_pid == pid
    assert Event.objects.count() == USES_BEFORE + 3


def test_columns_of_another_type_are_met_by_a_new_plan():
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE kanthorq_django_event ALTER COLUMN stream_id TYPE integer")
    try:
        publish("order.created")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE kanthorq_django_event ALTER COLUMN stream_id TYPE bigint")
    publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 4


@pytest.mark.parametrize("kept", ["Wake who listens", "Insert one event"])
def test_what_the_server_forgot_is_run_again_and_what_was_committed_is_not(
    monkeypatch: pytest.MonkeyPatch, kept: str
):
    monkeypatch.setattr(notifications, "LONE_AFTER", -1)
    publish("order.created")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT name FROM pg_prepared_statements WHERE statement LIKE %s", [f"%{kept}%"]
        )
        cursor.execute(f'DEALLOCATE "{cursor.fetchone()[0]}"')
    publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 4


def test_what_a_trigger_does_not_support_has_nothing_prepared_anew():
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE feature_not_supported; END $$;"
            "CREATE TRIGGER refusing AFTER INSERT ON kanthorq_django_event "
            "FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    try:
        kept = []
        for _ in range(3):
            with pytest.raises(NotSupportedError):
                publish("order.created")
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_prepared_statements")
                kept.append(cursor.fetchone()[0])
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION refuse CASCADE")
    assert len(set(kept)) == 1


def test_a_database_that_is_forbidden_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BaseDatabaseWrapper, "ensure_connection", refuse)
    with pytest.raises(OperationalError, match="nobody is there"):
        publish("order.created")


def test_a_connection_of_another_thread_is_refused():
    mine = connections["default"]

    def publish_on_mine() -> None:
        yours, connections["default"] = connections["default"], mine
        try:
            publish("order.created")
        finally:
            connections["default"] = yours

    with pytest.raises(DatabaseError, match="can only be used in that same thread"):
        elsewhere(publish_on_mine)


def test_threads_that_share_a_connection_get_their_own_answers():
    shared, published = connections["default"], list[Event]()
    shared.inc_thread_sharing()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def publish_on_it() -> None:
        connections["default"] = shared
        published.extend(publish("order.created", str(number)) for number in range(200))

    try:
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(publish_on_it) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
        shared.dec_thread_sharing()
    stored = Event.objects.in_bulk([event.pk for event in published])
    assert len(stored) == 800
    for event in published:
        assert (event.xid, event.created_at) == (stored[event.pk].xid, stored[event.pk].created_at)


ENCODINGS = pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "SQL_ASCII", "UTF8"])
GIVEN: dict[str, Any] = {"metadata": {"ä": "ü"}, "resource_key": "ö", "body": "é"}


@contextlib.contextmanager
def client_encoding(encoding: str) -> Iterator[None]:
    """Let connections have ``encoding``, as a receiver of the project's may."""

    def set_encoding(connection: BaseDatabaseWrapper, **_: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('client_encoding', %s, false)", [encoding])

    connection_created.connect(set_encoding)
    connection.close()
    try:
        yield
    finally:
        connection_created.disconnect(set_encoding)
        connection.close()


@ENCODINGS
@pytest.mark.parametrize(
    "publish_some",
    [
        lambda subject: [publish(subject, **GIVEN, idempotency_key="ß")],
        lambda subject: publish_many([Event(subject=subject, **GIVEN) for _ in range(2)]),
        lambda subject: publish_many(
            [Event(subject=subject, **GIVEN, idempotency_key=key) for key in "äß"]
        ),
    ],
    ids=["alone", "copied", "keyed"],
)
def test_text_is_stored_as_it_is_whatever_the_connections_encoding(
    encoding: str, publish_some: Callable[[str], list[Event]]
):
    with client_encoding(encoding):
        published = publish_some("order.größe")
    for event in published:
        stored = Event.objects.get(pk=event.pk)
        assert (stored.subject, stored.metadata) == ("order.größe", {"ä": "ü"})
        assert (stored.resource_key, bytes(stored.body)) == ("ö", "é".encode())
        assert stored.idempotency_key == event.idempotency_key


@ENCODINGS
def test_text_is_read_as_it_is_whatever_the_connections_encoding(encoding: str):
    consumer = ConsumerFactory.create(subject_includes=["größe.>"])
    publish("größe.ü", **GIVEN, stream=consumer.stream.name, idempotency_key="ß")
    with client_encoding(encoding):
        (leased,) = consumer.pull_page(10).leased
    event = leased.event  # its connection is closed by now
    assert (event.subject, event.metadata, event.idempotency_key) == ("größe.ü", {"ä": "ü"}, "ß")
    assert (event.resource_key, leased.resource_key, leased.task.resource_key) == ("ö", "ö", "ö")


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "UTF8"])  # Django reads all but ASCII
@pytest.mark.parametrize("is_open", [False, True])
def test_handlers_get_text_as_it_is_whatever_the_connections_encoding(encoding: str, is_open: bool):
    handled: list[tuple[str, str]] = []

    @subscribe("größe.>", consumer="reader")
    def note(message: Message) -> dict[str, str]:
        handled.append((message.event.subject, message.event.resource_key))
        return {"ä": "ü"}

    publish("größe.ü", **GIVEN)
    with client_encoding(encoding), transaction.atomic() if is_open else contextlib.nullcontext():
        assert drain("reader") == 1
    assert handled == [("größe.ü", "ö")]
    task = Task.objects.get()
    assert (task.state, task.result) == (TaskState.COMPLETED, {"ä": "ü"})


@pytest.mark.parametrize(
    "given", [{"subject": "日本"}, {"subject": "b", "metadata": {"price": {"in": ["5 €"]}}}]
)
def test_text_that_the_connection_cannot_send_leaves_the_transaction_usable(given: dict[str, Any]):
    keyed = given | {"idempotency_key": "key"}
    with client_encoding("LATIN1"), transaction.atomic():
        for many in ([given], [{"subject": "a"}, given], [{"subject": "a"}, keyed]):
            with pytest.raises(UnicodeEncodeError):
                publish_many([Event(**each) for each in many])
        publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 3


@pytest.mark.parametrize("use", range(USES_BEFORE + 1))
def test_a_block_that_is_marked_for_rollback_takes_no_event(use: int):
    connection.close()
    for _ in range(use):
        publish("order.created")
    Stream.objects.get_or_create(name="taken")
    with transaction.atomic():
        with contextlib.suppress(IntegrityError):
            Stream.objects.create(name="taken")
        with pytest.raises(TransactionManagementError):
            publish("order.created")


def test_who_runs_a_pipeline_publishes_into_it():
    with transaction.atomic():
        Stream.objects.create(name="before")
        with connection.connection.pipeline():
            publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 3


@pytest.mark.parametrize("lone_after", [-1, 3600])
def test_a_pipeline_takes_events_outside_of_a_block_too(
    monkeypatch: pytest.MonkeyPatch, lone_after: float
):
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    with connection.connection.pipeline():
        publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 3


def end_connection() -> None:
    """Let the server close our connection, of which we know nothing yet."""
    with raw_connection() as other:
        pid = connection.connection.info.backend_pid
        other.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


def refuse(*_: object) -> Any:
    raise OperationalError("nobody is there")
