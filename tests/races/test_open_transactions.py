from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest
from django.db import connection, connections, transaction

from kanthorq_django import publish
from kanthorq_django.models import Consumer, Stream
from kanthorq_django.models.registration import Registration
from tests.races.race import altered, between_lock_and_read, execute

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("one_line_of_defence"),
]

OWN_XID_SAFETY = "CASE WHEN pg_visible_in_snapshot(pg_current_xact_id(), latest) THEN"


@pytest.fixture
def consumer() -> Consumer:
    return register("reader")


def register(name: str, deliver: str = "all") -> Consumer:
    return Consumer.objects.register(name, Registration("s", includes=[">"], deliver=deliver))


def pulled(consumer: Consumer) -> list[UUID]:
    return [task.event_id for task in consumer.pull()]


def publish_now(using: str = "default") -> UUID:
    return publish("a.b", stream="s", using=using).id


def burn_xid(using: str) -> None:
    """Complete a transaction of another connection, so that the snapshot moves on."""
    execute(using, "SELECT pg_current_xact_id()")


def test_an_open_transaction_delays_its_own_events_and_no_others(consumer: Consumer, second: str):
    with transaction.atomic(using=second):
        early = publish_now(second)
        later = [publish_now() for _ in range(3)]
        assert pulled(consumer) == later
        latest = publish_now()
        assert pulled(consumer) == [latest]
        assert pulled(consumer) == []

    assert pulled(consumer) == [early]
    assert pulled(consumer) == []


def test_an_open_transaction_stays_unread_through_an_open_window(consumer: Consumer, second: str):
    with transaction.atomic(using=second):
        early = publish_now(second)
        later = {publish_now() for _ in range(4)}
        first = consumer.pull(limit=3)  # a window opens, in which the other is still running
    rest = pulled(consumer) + pulled(consumer)

    assert {task.event_id for task in first} | set(rest) == later | {early}
    assert len(first) + len(rest) == 5
    assert pulled(consumer) == []


@contextmanager
def prepared(using: str) -> Iterator[None]:
    """Run the block in a transaction that is then prepared under the name ``kept``."""
    handle = connections[using]
    handle.set_autocommit(False)
    try:
        yield
        execute(using, "PREPARE TRANSACTION 'kept'")
    finally:
        handle.rollback()
        handle.set_autocommit(True)


@pytest.fixture
def two_phase_commit() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SHOW max_prepared_transactions")
        if cursor.fetchone() == ("0",):
            pytest.skip("max_prepared_transactions is 0 on this server")


@pytest.mark.usefixtures("two_phase_commit")
def test_a_prepared_transaction_is_read_once_it_is_committed(consumer: Consumer, second: str):
    with prepared(second):
        early = publish_now(second)
    later = publish_now()
    assert pulled(consumer) == [later]
    assert pulled(consumer) == []

    execute(second, "COMMIT PREPARED 'kept'")

    assert pulled(consumer) == [early]
    assert pulled(consumer) == []


@pytest.mark.usefixtures("two_phase_commit")
def test_a_prepared_transaction_that_is_rolled_back_is_never_read(consumer: Consumer, second: str):
    with prepared(second):
        publish_now(second)
    later = publish_now()
    assert pulled(consumer) == [later]

    execute(second, "ROLLBACK PREPARED 'kept'")

    assert pulled(consumer) == []


@pytest.fixture
def echo() -> Iterator[None]:
    """A trigger that publishes an event for every task, inside the pull's own transaction."""
    execute(
        "default",
        """
        CREATE FUNCTION echo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO kanthorq_django_event
                (id, stream_id, subject, body, metadata, resource_key)
            SELECT gen_random_uuid(), stream_id, 'echo', '', '{}', 'echo'
            FROM kanthorq_django_consumer WHERE id = NEW.consumer_id;
            RETURN NULL;
        END $$;
        CREATE TRIGGER echo AFTER INSERT ON kanthorq_django_task
            FOR EACH ROW WHEN (NEW.resource_key = '') EXECUTE FUNCTION echo();
        """,
    )
    yield
    execute("default", "DROP FUNCTION echo() CASCADE")


def subjects_of_two_pulls(consumer: Consumer) -> list[list[str]]:
    return [[task.event.subject for task in consumer.pull()] for _ in range(3)]


@pytest.mark.usefixtures("echo")
def test_what_a_trigger_publishes_inside_a_pull_is_read_by_the_next(
    consumer: Consumer, second: str, monkeypatch: pytest.MonkeyPatch
):
    publish_now()
    with between_lock_and_read(monkeypatch, lambda: burn_xid(second)):
        assert subjects_of_two_pulls(consumer) == [["a.b"], ["echo"], []]


@pytest.mark.usefixtures("echo")
def test_it_would_be_lost_if_a_snapshot_were_not_made_safe_for_its_own_transaction(
    consumer: Consumer, second: str, monkeypatch: pytest.MonkeyPatch
):
    publish_now()
    with (
        altered(monkeypatch, "pull", (OWN_XID_SAFETY, "CASE WHEN false THEN")),
        between_lock_and_read(monkeypatch, lambda: burn_xid(second)),
    ):
        assert subjects_of_two_pulls(consumer) == [["a.b"], [], []]


@pytest.mark.parametrize("is_followed", [False, True])
def test_raw_sql_inside_a_pull_publishes_for_the_next(
    consumer: Consumer, second: str, monkeypatch: pytest.MonkeyPatch, *, is_followed: bool
):
    before, within = publish_now(), uuid4()
    stream = Stream.objects.get(name="s").pk

    def publish_within() -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata,"
                " resource_key) VALUES (%s, %s, 'raw', '', '{}', '') ON CONFLICT DO NOTHING",
                [within, stream],
            )
        if is_followed:
            burn_xid(second)

    with between_lock_and_read(monkeypatch, publish_within):
        assert pulled(consumer) == [before]
    assert pulled(consumer) == [within]
    assert pulled(consumer) == []


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_consumer_that_starts_new_gets_all_of_the_transaction_that_registers_it(
    second: str, third: str, *, is_followed: bool
):
    publish_now()
    with transaction.atomic(using=second):
        straddling = publish_now(second)
        with transaction.atomic():
            before = publish_now()
            if is_followed:
                burn_xid(third)
            consumer = register("late", deliver="new")
            after = publish_now()

    assert set(pulled(consumer)) == {straddling, before, after}
    assert pulled(consumer) == []
