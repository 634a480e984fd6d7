"""By which index a kept plan reads, whatever the server knew when it made the plan."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from kanthorq_django import publish, publish_many, sql
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.delivery import cursor, lease
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.publishing import notifications
from kanthorq_django.models.registration import Registration
from kanthorq_django.sql import round_trip
from kanthorq_django.sql.binding import Statement
from kanthorq_django.sql.session import USES_BEFORE, session_of
from tests.announcements import forget_notifications, raw_connection

DEAD = 50_000  # an index over so many is one level higher than another
LATER = 1_000

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Consumer]:
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 0)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    connection.close()
    yield Consumer.objects.register("reader", Registration("default", includes=[">"]))
    connection.close()


def execute(statement: str, *params: Any) -> None:
    with connection.cursor() as asked:
        asked.execute(statement, params or None)


def add_tasks(consumer: Consumer, count: int, state: int) -> None:
    events = publish_many([Event(subject="a.b") for _ in range(count)])
    execute(
        """
        INSERT INTO kanthorq_django_task (
            consumer_id, event_id, resource_key, state, schedule_at, attempt_count, lease_epoch,
            attempted_at
        )
        SELECT %s, id, '', %s, statement_timestamp(), 1, 1, statement_timestamp()
        FROM unnest(%s::uuid[]) AS event (id)
        """,
        consumer.pk,
        state,
        [event.pk for event in events],
    )


def empty(consumer: Consumer) -> None:
    execute("VACUUM ANALYZE kanthorq_django_task, kanthorq_django_event")


def full_of_dead_entries(consumer: Consumer) -> None:
    """Leave nothing but entries that VACUUM may not take, as somebody could see them yet."""
    with raw_connection() as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        add_tasks(consumer, DEAD, 1)
        execute("DELETE FROM kanthorq_django_task; DELETE FROM kanthorq_django_event")
        empty(consumer)


def of_one_event(consumer: Consumer) -> None:
    publish("order.created")
    execute("ANALYZE kanthorq_django_event, kanthorq_django_task")


def look(consumer: Consumer) -> None:
    cursor.has_unread(consumer)


def pull(consumer: Consumer) -> None:
    consumer.pull_page(1_000)


def claim(consumer: Consumer) -> None:
    claim_due(consumer, 100, CLAIMABLE)


def plan_of(name: str, monkeypatch: pytest.MonkeyPatch, used: Callable[[], None]) -> str:
    """Return the plan that the server keeps of ``<name>.sql`` after its first uses."""
    given: dict[str, Any] = {}
    settings: list[Statement] = []
    bind = round_trip.bind  # type: ignore[attr-defined]

    def noted(raw: Any, session: Any, statements: Any, params: Any) -> Any:
        given.update(params)
        settings.extend(each for each in statements if "enable_seqscan" in each.text)
        return bind(raw, session, statements, params)

    for _ in range(USES_BEFORE + 2):
        used()
    with monkeypatch.context() as patch:
        patch.setattr(round_trip, "bind", noted)
        used()
    kept = session_of(connection.connection).prepared[sql.load(name)]
    values = ", ".join(["%s"] * len(kept.params))
    with transaction.atomic(), connection.cursor() as asked:
        asked.execute(settings[0].text)
        asked.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        asked.execute(
            f"EXPLAIN EXECUTE {kept.name.decode()} ({values})",
            [given[param] for param in kept.params],
        )
        return "\n".join(line for (line,) in asked.fetchall())


UNREAD, EVENT = "kanthorq_event_unread", "kanthorq_django_event_pkey"
DUE, TURN_DUE, TASK = "kanthorq_task_due", "kanthorq_task_turn_due", "kanthorq_django_task_pkey"


@pytest.mark.parametrize("made", [empty, full_of_dead_entries, of_one_event])
@pytest.mark.parametrize(
    ("name", "used", "indexes"),
    [
        ("peek", look, [UNREAD, UNREAD, UNREAD, TURN_DUE, DUE]),
        ("pull", pull, [UNREAD, UNREAD, UNREAD, EVENT]),
        ("claim", claim, [DUE, TASK, TASK, TASK, EVENT, EVENT]),
    ],
)
def test_it_reads_by_the_same_indexes_whenever_it_was_made(
    name: str,
    used: Callable[[Consumer], None],
    indexes: list[str],
    made: Callable[[Consumer], None],
    reader: Consumer,
    monkeypatch: pytest.MonkeyPatch,
):
    made(reader)
    plan = plan_of(name, monkeypatch, lambda: used(reader))
    reads = re.findall(r" using (\w+) on kanthorq_django_(?:task|event)", plan)
    assert sorted(reads) == sorted(indexes)
    assert not re.search(r"Scan on kanthorq_django_(?:task|event)", plan)


def ack_one(task: Task) -> None:
    lease.ack({task.lease: None}, "default")


def ack_last(task: Task) -> None:
    lease.ack_and_commit({task.lease: None}, "default")


def ack_group(task: Task) -> None:
    again = Task.objects.running().exclude(pk=task.pk)[:1]
    lease.ack_and_commit(dict.fromkeys([task.lease, *(other.lease for other in again)]), "default")


@pytest.mark.parametrize("end", [ack_one, ack_last, ack_group])
def test_verdicts_read_no_tasks_but_their_own_when_many_came_since_the_first(
    end: Callable[[Task], None], reader: Consumer, monkeypatch: pytest.MonkeyPatch
):
    empty(reader)
    add_tasks(reader, 10 * USES_BEFORE, 2)
    for _ in range(USES_BEFORE + 7):
        with transaction.atomic():
            end(Task.objects.running().order_by("id")[0])
    add_tasks(reader, LATER, 2)
    # What a transaction has read is counted until it ends.
    monkeypatch.setattr(sql, "COMMIT", Statement("SELECT;"))
    task = Task.objects.running().order_by("id")[0]
    with transaction.atomic():
        before = rows_read()
        end(task)
        assert rows_read() - before < LATER
        transaction.set_rollback(True)


def rows_read() -> int:
    """Return how many tasks this transaction has read from the table's start to its end."""
    with connection.cursor() as asked:
        asked.execute(
            "SELECT seq_tup_read FROM pg_stat_xact_user_tables "
            "WHERE relname = 'kanthorq_django_task'"
        )
        (count,) = asked.fetchone()
    return int(count)


def test_what_a_verdict_sets_for_its_plan_is_as_before_afterwards(reader: Consumer):
    add_tasks(reader, 2 * USES_BEFORE, 2)
    connection.ensure_connection()
    tasks = list(Task.objects.running())
    for task in tasks[:-1]:
        ack_one(task)
    with transaction.atomic():
        execute("SET LOCAL enable_sort = off")
        ack_one(tasks[-1])
        with connection.cursor() as asked:
            asked.execute(
                "SELECT current_setting('enable_seqscan'), current_setting('enable_sort'), "
                "current_setting('jit')"
            )
            seqscan, sort, jit = asked.fetchone()
    assert (seqscan, sort) == ("on", "off")
    with connection.cursor() as asked:
        asked.execute("SHOW jit")
        assert asked.fetchone() == (jit,)


def test_a_look_within_a_transaction_leaves_its_settings_alone(reader: Consumer):
    names = ["enable_seqscan", "enable_bitmapscan", "enable_sort", "jit", "plan_cache_mode"]

    def settings() -> list[tuple[Any, ...]]:
        with connection.cursor() as asked:
            asked.execute("SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", [names])
            return sorted(asked.fetchall())

    publish("order.created")
    before = settings()
    with transaction.atomic():
        assert cursor.has_unread(reader)
        assert settings() == before
