import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import psycopg
import pytest
from django.db import connection, transaction
from pytest_django import DjangoDbBlocker

from kanthorq_django import sql
from kanthorq_django.domain import subjects
from kanthorq_django.models import Consumer, Stream
from kanthorq_django.models.delivery.cursor import NO_FLOOR
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX
from kanthorq_django.models.registration import Registration
from tests.announcements import raw_connection

EVENT_COUNT = 200_000
EVENTS_PER_TRANSACTION = 1_000
PAGE_SIZE = 500
INDEX = "kanthorq_event_unread"
# An index page holds some 200 entries, a page of the table some 70 events.
BLOCKS_OF_A_PAGE = 50


pytestmark = pytest.mark.django_db


@pytest.fixture(scope="module")
def reader(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[Consumer]:
    """A consumer that has read nothing of a large stream; each test rolls back what it does."""
    with django_db_blocker.unblock():
        # What other tests left would have its gaps filled, and scatter a page over the table.
        execute("TRUNCATE kanthorq_django_event, kanthorq_django_task, kanthorq_django_consumer")
        consumer = Consumer.objects.register("reader", Registration("large", includes=[">"]))
        execute(
            f"""
            DO $$ BEGIN FOR i IN 1..{EVENT_COUNT // EVENTS_PER_TRANSACTION} LOOP
                INSERT INTO kanthorq_django_event
                    (id, stream_id, subject, body, metadata, resource_key)
                SELECT lpad(to_hex(i * {EVENTS_PER_TRANSACTION} + n), 32, '0')::uuid,
                    {consumer.stream_id}, 'a.b', '', '{{}}', ''
                FROM generate_series(1, {EVENTS_PER_TRANSACTION}) AS n;
                COMMIT;
            END LOOP; END $$
            """  # noqa: S608  # numbers of this file
        )
        execute("VACUUM ANALYZE kanthorq_django_event")
        yield consumer
        execute("TRUNCATE kanthorq_django_event, kanthorq_django_task, kanthorq_django_consumer")
        Stream.objects.all().delete()


class Scan(NamedTuple):
    """A node of a plan that reads events."""

    kind: str
    index_name: str | None
    rows: float
    rows_removed: float
    blocks: int


def execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def event_scans(statement: str, params: dict[str, Any]) -> list[Scan]:
    """Run the statement, roll it back, and return how it read events."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}", params)
        (explained,) = cursor.fetchone()
        transaction.set_rollback(True)
    plan = explained if isinstance(explained, list) else json.loads(explained)
    return [scan_of(node) for node in nodes(plan[0]["Plan"]) if reads_events(node)]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def reads_events(node: dict[str, Any]) -> bool:
    return node.get("Relation Name") == "kanthorq_django_event"


def scan_of(node: dict[str, Any]) -> Scan:
    loops = node["Actual Loops"]
    return Scan(
        node["Node Type"],
        node.get("Index Name"),
        node["Actual Rows"] * loops,
        node.get("Rows Removed by Filter", 0) * loops,
        node["Shared Hit Blocks"] + node["Shared Read Blocks"],
    )


def pull_scans(
    consumer: Consumer, statement: str | None = None, *, includes: str = "nothing"
) -> list[Scan]:
    """Return how the next pull of ``consumer`` would read events, without its final join."""
    sql.rows("default", "lock_consumer", {"consumer_id": consumer.pk})
    params = {
        "consumer_id": consumer.pk,
        "subject_includes": json.dumps(consumer.subject_includes),
        "subject_excludes": json.dumps(consumer.subject_excludes),
        "includes": subjects.to_regex([includes]),
        "excludes": subjects.to_regex([]),
        "limit": 100,
        "size_max": BODIES_SIZE_MAX,
        "visibility_timeout": consumer.visibility_timeout,
        "page_size": PAGE_SIZE,
    }
    scans = event_scans(statement or sql.load("pull"), params)
    return [scan for scan in scans if scan.index_name != "kanthorq_django_event_pkey"]


def assert_bounded(scans: list[Scan], *, rows: int = PAGE_SIZE) -> None:
    read = [scan for scan in scans if scan.blocks]
    assert read, "whatever was looked at, it was not the events"
    assert {scan.kind for scan in read} <= {"Index Scan", "Index Only Scan"}
    assert {scan.index_name for scan in read} <= {INDEX}
    assert sum(scan.rows + scan.rows_removed for scan in read) <= rows
    assert sum(scan.blocks for scan in read) <= BLOCKS_OF_A_PAGE


def place(consumer: Consumer, cursor: str, window: str = "NULL", row: int = 0) -> None:
    """Set the cursor to an expression over the event number ``row``, from 0."""
    position = "NULL, NULL" if window == "NULL" else "event.xid, event.id"
    execute(
        f"""
        UPDATE kanthorq_django_consumer AS consumer
        SET ("cursor", "window", position_xid, position_id) = ({cursor}, {window}, {position})
        FROM (
            SELECT xid, id FROM kanthorq_django_event ORDER BY xid, id OFFSET {row} LIMIT 1
        ) AS event
        WHERE consumer.id = {consumer.pk}
        """  # noqa: S608  # expressions of this file
    )


# What other tests have open on this server, a cursor may not have seen ended.
LOWEST = "least(event.xid, pg_snapshot_xmin(pg_current_snapshot()))"
BEHIND = f"format('%s:%s:', {LOWEST}, event.xid)::pg_snapshot"


def place_in_the_middle(consumer: Consumer) -> None:
    """Leave the consumer in an open window, half of which it has read."""
    place(consumer, "'1:1:'", "pg_current_snapshot()", EVENT_COUNT // 2)


def test_the_first_page_of_a_large_stream_is_one_index_range(reader: Consumer):
    scans = pull_scans(reader)

    assert_bounded(scans)
    assert sum(scan.rows for scan in scans) == PAGE_SIZE


def test_a_page_from_the_middle_of_a_window_starts_where_the_last_one_ended(reader: Consumer):
    place_in_the_middle(reader)

    scans = pull_scans(reader)

    assert_bounded(scans)
    assert sum(scan.rows for scan in scans) == PAGE_SIZE


def test_two_conditions_instead_of_the_folded_one_would_wade_through_what_was_read(
    reader: Consumer,
):
    """The planner trap: the index scan starts at the lower of them, which is no position."""
    place(reader, BEHIND, row=EVENT_COUNT - 1)
    folded = "> ((SELECT fresh_xid FROM reader), (SELECT fresh_id FROM reader))"
    unfolded = (
        "> ((SELECT coalesce(position_xid, '0') FROM reader), "
        "(SELECT coalesce(position_id, '00000000-0000-0000-0000-000000000000') FROM reader)) "
        'AND xid >= (SELECT pg_snapshot_xmax("cursor") FROM reader)'
    )
    text = sql.load("pull")
    assert folded in text
    trap = text.replace(folded, unfolded)

    assert sum(scan.blocks for scan in pull_scans(reader, trap)) > 10 * BLOCKS_OF_A_PAGE


def test_the_end_of_a_large_stream_is_read_without_its_beginning(reader: Consumer):
    place(reader, BEHIND, row=EVENT_COUNT - 1)

    scans = pull_scans(reader)

    assert_bounded(scans)
    assert sum(scan.rows for scan in scans) == PAGE_SIZE


def test_a_transaction_that_was_open_costs_one_index_probe(reader: Consumer):
    latest = "pg_snapshot_xmax(pg_current_snapshot())"
    place(reader, f"format('%s:%s:%s', {LOWEST}, {latest}, event.xid)::pg_snapshot")

    scans = pull_scans(reader)

    assert_bounded(scans)
    assert sum(scan.rows for scan in scans) == PAGE_SIZE


def test_late_events_that_fill_a_page_leave_fresh_ones_unread(reader: Consumer):
    after = "event.xid::text::bigint + 1"
    place(reader, f"format('%s:%s:%s', {LOWEST}, {after}, event.xid)::pg_snapshot")

    assert_bounded(pull_scans(reader), rows=PAGE_SIZE + 1)


def test_what_is_not_committed_is_looked_through_once_however_much_is_pulled(reader: Consumer):
    with raw_connection() as publisher:
        publisher.autocommit = False
        insert(publisher, reader, PAGE_SIZE)
        scans = pull_scans(reader, includes=">")
        publisher.rollback()

    assert 100 <= sum(scan.rows + scan.rows_removed for scan in scans) <= PAGE_SIZE
    assert sum(scan.blocks for scan in scans) <= 2 * PAGE_SIZE  # each in a page of its own


def test_an_idle_look_probes_the_end_of_the_index(reader: Consumer):
    place(reader, "pg_current_snapshot()")

    assert_bounded(event_scans(sql.load("peek"), look(reader)), rows=0)


@pytest.mark.parametrize("began", ["before the cursor", "after it"])
def test_a_look_jumps_over_what_is_not_committed(reader: Consumer, began: str):
    place(reader, "pg_current_snapshot()")
    with raw_connection() as publisher, raw_connection() as other:
        publisher.autocommit = other.autocommit = False
        insert(publisher, reader, PAGE_SIZE)
        insert(other, reader, PAGE_SIZE)
        # What ends while they are open lets a snapshot tell of them.
        with raw_connection() as later:
            later.execute("SELECT pg_current_xact_id()")
        if began == "before the cursor":
            place(reader, "pg_current_snapshot()")
        assert_bounded(event_scans(sql.load("peek"), look(reader)), rows=0)

        with raw_connection() as later:
            insert(later, reader, 1)
        scans = event_scans(sql.load("peek"), look(reader))
        assert round(sum(scan.rows for scan in scans)) == 1  # a mean of all jumps, times these
        publisher.rollback()
        other.rollback()


def insert(publisher: psycopg.Connection[Any], reader: Consumer, count: int) -> None:
    publisher.execute(
        """
        INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata, resource_key)
        SELECT gen_random_uuid(), %s, 'a.b', '', '{}', '' FROM generate_series(1, %s)
        """,
        [reader.stream_id, count],
    )


def look(reader: Consumer) -> dict[str, Any]:
    return {
        "consumer_ids": [reader.pk],
        "floors": [NO_FLOOR],
        "states": [1],
        "horizon": timedelta(0),
    }


def test_the_lag_reads_no_further_than_its_limit(reader: Consumer):
    place_in_the_middle(reader)

    scans = event_scans(sql.load("lag"), {"consumer_id": reader.pk, "limit": PAGE_SIZE})

    assert_bounded(scans, rows=PAGE_SIZE + 1)
    assert reader.lag()[:2] == (10_000, True)
