"""Which statements the server keeps, and on which connections."""

from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from django.db import (
    IntegrityError,
    ProgrammingError,
    connection,
    connections,
    reset_queries,
    transaction,
)
from django.db.backends.postgresql.base import DatabaseWrapper
from django.test.utils import CaptureQueriesContext
from pytest_django import Settings

from kanthorq_django import publish
from kanthorq_django.models import Event, Stream
from kanthorq_django.models.publishing import notifications
from kanthorq_django.sql import BY_ONE_PLAN, round_trip
from kanthorq_django.sql.session import USES_BEFORE
from tests.announcements import forget_notifications

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def new_connection(monkeypatch: pytest.MonkeyPatch):
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 0)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    connection.close()
    yield
    connection.close()


def kept() -> set[str]:
    """Return what the server keeps for this connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement FROM pg_prepared_statements")
        return {statement.split("\n")[0] for (statement,) in cursor.fetchall()}


def publish_often() -> None:
    for _ in range(USES_BEFORE + 2):
        publish("order.created", b"1")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that were bound by libpq's protocol."""
    found: list[str] = []
    bind = round_trip.bind  # type: ignore[attr-defined]

    def noted(raw: Any, session: Any, statements: Any, params: Any) -> Any:
        found.extend(statement.text for statement in statements)
        return bind(raw, session, statements, params)

    monkeypatch.setattr(round_trip, "bind", noted)
    return found


@pytest.mark.parametrize("lone_after", [3600, -1])
def test_a_connection_is_asked_about_when_it_has_been_used_often_enough(
    monkeypatch: pytest.MonkeyPatch, lone_after: float
):
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    publish("order.created")  # the process knows whom to tell from now on
    connection.close()
    for _ in range(USES_BEFORE - 1):
        publish("order.created")
    assert kept() == set()
    publish("order.created")
    assert kept() != set()


def test_what_is_repeated_is_kept_by_the_server():
    publish_often()
    assert any("Insert one event" in statement for statement in kept())


def test_a_connection_that_is_used_once_costs_nothing_more():
    publish("order.created")
    with CaptureQueriesContext(connection) as captured:
        publish("order.created")
    assert not kept()
    assert not [query for query in captured if "pg_backend_pid" in query["sql"]]


def test_queries_are_counted_as_those_of_django_are(django_assert_num_queries):
    publish_often()
    with django_assert_num_queries(2):  # the event, and the notification
        publish("order.created")


def test_queries_are_logged_where_a_project_debugs(settings: Settings):
    publish_often()
    settings.DEBUG = True
    reset_queries()
    publish("order.created")
    assert any("Insert one event" in query["sql"] for query in connection.queries)


def test_behind_a_pooler_nothing_is_kept(monkeypatch: pytest.MonkeyPatch):
    # A pooler answers with a process id of its own, as pgbouncer does.
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", 1)
    publish_often()
    assert not kept()


def test_django_itself_still_prepares_nothing():
    publish_often()
    for _ in range(10):
        connections["default"].introspection.table_names()
    assert all("Insert one event" in statement for statement in kept())


def test_a_new_column_does_not_invalidate_what_is_kept():
    from kanthorq_django import subscribe
    from kanthorq_django.subscribers import sync

    subscribe("order.>", consumer="kept")(lambda message: None)
    (consumer,) = sync(["kept"])
    for _ in range(USES_BEFORE + 2):
        publish("order.created")
        consumer.pull()
    try:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE kanthorq_django_task ADD COLUMN novel integer DEFAULT 1")
        publish("order.created")
        assert len(consumer.pull()) == 1
        assert consumer.claim() == []
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE kanthorq_django_task DROP COLUMN novel")


@pytest.mark.parametrize("lone_after", [3600, -1])
def test_a_connection_that_was_reset_prepares_anew(
    monkeypatch: pytest.MonkeyPatch, lone_after: float
):
    from kanthorq_django import subscribe
    from kanthorq_django.subscribers import sync

    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    subscribe("order.>", consumer="kept")(lambda message: None)
    (consumer,) = sync(["kept"])
    for count in range(USES_BEFORE + 2):
        publish("order.created")
        assert len(consumer.pull()) == 1, count
    for is_first in (False, True):
        with connection.cursor() as cursor:
            cursor.execute("DISCARD ALL")
        if is_first:
            with transaction.atomic():
                publish("order.created")
                publish("order.created")
        publish("order.created")
        assert len(consumer.pull()) == 1 + 2 * is_first
        assert kept()


@pytest.mark.parametrize(
    "option",
    [{"prepare_threshold": None}, {"prepare_threshold": 5}, {"pool": {"reset": print}}],
    ids=["never", "by psycopg", "a pool resets"],
)
def test_where_a_project_decides_what_is_kept_nothing_of_ours_is(
    monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
):
    connection.ensure_connection()
    with monkeypatch.context() as patch:
        patch.setitem(connection.settings_dict, "OPTIONS", option)
        patch.setattr(DatabaseWrapper, "pool", None)  # the package is not needed for this
        publish_often()
        assert not kept()


def stored(event: Event) -> Event:
    return Event.objects.get(pk=event.pk)


def test_an_event_is_the_same_whether_its_statement_is_kept_or_not(bound: list[str]):
    moment = datetime(2027, 1, 2, 3, 4, 5, 678_901, tzinfo=ZoneInfo("America/Caracas"))
    given: dict[str, Any] = {
        "body": bytes(range(256)),
        "metadata": {"ä": ["\\", "'", None, 1.5]},
        "resource_key": "Schlüssel",
        "schedule_at": moment,
    }
    first = publish("bestellung.größer", **given)
    assert not bound
    publish_often()
    last = publish("bestellung.größer", **given)
    assert bound

    for name in ("subject", *given, "stream_id"):
        assert getattr(stored(first), name) == getattr(stored(last), name) == getattr(last, name)
    assert (stored(last).xid, stored(last).created_at) == (last.xid, last.created_at)


def test_a_moment_without_a_zone_means_the_same_whether_the_statement_is_kept_or_not(
    settings, bound: list[str]
):
    settings.USE_TZ, settings.TIME_ZONE = False, "America/Caracas"
    connection.close()
    moment = datetime(2027, 1, 2, 3, 4, 5)  # noqa: DTZ001  # on purpose
    first = publish("order.later", schedule_at=moment)
    publish_often()
    last = publish("order.later", schedule_at=moment)
    assert bound
    assert stored(first).schedule_at == stored(last).schedule_at == moment


def test_an_error_of_a_kept_statement_is_djangos_and_a_savepoint_takes_it_back():
    publish_often()
    event = publish("order.created")
    again = Event(subject="order.created")
    again.id = again._drawn_id = event.pk  # as no id that is drawn can be
    with transaction.atomic():
        Stream.objects.create(name="before")
        with pytest.raises(IntegrityError), transaction.atomic():
            Event.objects.publish([again], stream="default")
        publish("order.created")
    again._drawn_id = event.pk
    with pytest.raises(IntegrityError):
        Event.objects.publish([again], stream="default")
    publish("order.created")
    assert Event.objects.count() == USES_BEFORE + 5


def test_an_error_of_a_statement_that_was_forgotten_before_is_told_as_well():
    publish_often()
    event = publish("order.created")
    again = Event(subject="order.created")
    again.id = again._drawn_id = event.pk
    with connection.cursor() as cursor:
        cursor.execute("DISCARD ALL")
    with pytest.raises(IntegrityError):
        Event.objects.publish([again], stream="default")
    assert kept()
    publish("order.created")


def test_a_statement_that_is_forgotten_in_a_transaction_is_the_error_that_is_told():
    publish_often()
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("DEALLOCATE ALL")
        with pytest.raises(ProgrammingError, match="prepared statement"):
            publish("order.created")
        transaction.set_rollback(True)
    publish("order.created")


def test_a_broken_transaction_takes_no_event():
    publish_often()
    with transaction.atomic():
        publish("order.created")
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError):
            publish("order.created")


def test_what_begins_a_transaction_is_part_of_it():
    publish_often()
    with transaction.atomic():
        publish("order.created")
        transaction.set_rollback(True)
    assert Event.objects.count() == USES_BEFORE + 2


def test_wrappers_of_statements_see_those_that_are_kept():
    publish_often()
    seen: list[str] = []

    def wrapper(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        seen.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(wrapper):
        publish("order.created")
    assert any("Insert one event" in sql for sql in seen)


def test_a_pull_is_kept_and_planned_once_from_the_first_on():
    from kanthorq_django.models import Consumer
    from kanthorq_django.models.registration import Registration

    reader = Consumer.objects.register("reader", Registration("default", includes=[">"]))
    publish("order.created")
    connection.close()
    for _ in range(2):
        reader.pull_page(1)
    with connection.cursor() as asked:
        asked.execute(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements "
            "WHERE statement LIKE '%Turn a page%'"
        )
        assert asked.fetchall() == [(2, 0)]


def test_what_pulls_is_not_compiled():
    with transaction.atomic(), connection.cursor() as asked:
        asked.execute(BY_ONE_PLAN.text)
        asked.execute("SHOW jit")
        assert asked.fetchone() == ("off",)
