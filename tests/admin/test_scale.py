"""That no page reads a table: measured by the rows that PostgreSQL's plans went through."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from django.contrib.contenttypes.models import ContentType
from django.core.paginator import EmptyPage
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from kanthorq_django.admin import paginator, tally
from kanthorq_django.admin.display import Estimate, Minimum
from kanthorq_django.models import Consumer, Event, Stream, Task, TaskState, Worker
from tests.admin.pages import page, text_of
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = pytest.mark.django_db

MANY = 40_000
# Rows that one statement of a page may go through: what it counts, and then some.
READ_MAX = 2 * paginator.COUNT_MAX

# One row in 1,000 was discarded, one in 100 is available, the others are completed. Subjects are
# left out: how a search for one is answered depends on how common it is.
EVENTS = """
    INSERT INTO kanthorq_django_event
        (id, stream_id, subject, body, metadata, resource_key, created_at)
    SELECT (lpad(to_hex(n), 12, '0') || '70008000000000000000')::uuid, %(stream)s,
        'order.paid', 'x', '{}', 'key-' || n, statement_timestamp()
    FROM generate_series(1, %(many)s) AS n
"""
TASKS = """
    INSERT INTO kanthorq_django_task
        (consumer_id, event_id, resource_key, state, schedule_at, finalized_at, created_at)
    SELECT %(consumer)s, id, resource_key, wanted.state, statement_timestamp(),
        CASE WHEN wanted.state <> 1 THEN statement_timestamp() END, statement_timestamp()
    FROM kanthorq_django_event,
        LATERAL (SELECT substr(resource_key, 5)::integer) AS numbered (n),
        LATERAL (
            SELECT CASE WHEN n %% 1000 = 0 THEN -102 WHEN n %% 100 = 0 THEN 1 ELSE 101 END
        ) AS wanted (state)
    ORDER BY id
"""
LISTS = (
    "task/",
    "task/?p=2",
    "task/?o=1",
    "task/?state__exact=101",
    "task/?state__exact=-102",
    "task/?state__exact=0",
    "task/?state__exact=1",
    "task/?state__exact=2",
    "task/?stuck=yes",
    "task/?asked=yes",
    "task/?q=key-777",
    "task/?q=00000000-0309-7000-8000-000000000000",
    "event/",
    "event/?o=5",
    "event/?q=00000000-0309-7000-8000-000000000000",
    "consumer/",
    "stream/",
    "worker/",
)


@pytest.fixture
def crowd(db: None, monkeypatch: pytest.MonkeyPatch) -> Consumer:
    """A consumer with MANY tasks, most of them completed, in a table without old versions."""
    monkeypatch.setattr(tally, "SAMPLED", 1_000)
    consumer: Consumer = ConsumerFactory.create()
    params = {"many": MANY, "stream": consumer.stream_id, "consumer": consumer.pk}
    with connection.cursor() as cursor:
        # A new file for this transaction, or the planner would go by what other tests left.
        cursor.execute("TRUNCATE kanthorq_django_event, kanthorq_django_task")
        cursor.execute(EVENTS, params)
        cursor.execute(TASKS, params)
        for model in (Stream, Consumer, Event, Task):
            cursor.execute(f"ANALYZE {model._meta.db_table}")
    return consumer


def test_no_list_reads_more_rows_than_it_counts(admin_client: Client, crowd: Consumer):
    assert _read_too_much(admin_client, [f"/admin/kanthorq_django/{page}" for page in LISTS]) == {}


def test_no_rows_page_reads_more_rows_than_it_counts(admin_client: Client, crowd: Consumer):
    task = Task.objects.latest("pk")
    addresses = [
        page("stream_change", crowd.stream_id),
        page("event_change", task.event_id),
        page("consumer_change", crowd.pk),
        page("task_change", task.pk),
    ]
    assert _read_too_much(admin_client, addresses) == {}


def test_a_full_count_would_be_noticed(crowd: Consumer):
    assert _rows_read("SELECT count(*) FROM kanthorq_django_task") == MANY


def _read_too_much(client: Client, addresses: Iterable[str]) -> dict[str, int]:
    """Return how many rows each statement of these pages reads, of those that read too many."""
    read = {}
    for address in addresses:
        with CaptureQueriesContext(connection) as queries:
            assert client.get(address).status_code == 200
        for query in queries.captured_queries:
            if "kanthorq_django" in query["sql"] and "SELECT" in query["sql"]:
                read[f"{address} {query['sql'][:300]}"] = _rows_read(query["sql"])
    return {place: count for place, count in read.items() if count > READ_MAX}


def _rows_read(statement: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {statement}")
        (plans,) = cursor.fetchone()
    (plan,) = plans if isinstance(plans, list) else json.loads(plans)
    return max(_read_by(node) for node in _nodes(plan["Plan"]))


def _read_by(node: dict[str, Any]) -> int:
    removed = sum(count for name, count in node.items() if name.startswith("Rows Removed by"))
    return int((node["Actual Rows"] + removed) * node["Actual Loops"])


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", []):
        yield from _nodes(child)


def _make_tasks(count: int) -> None:
    for event in EventFactory.create_batch(count):
        consumer = ConsumerFactory.create(stream=event.stream)
        TaskFactory.create(consumer=consumer, event=event, state=TaskState.RETRYABLE)
        Worker.objects.create(host="h", pid=1, concurrency=1, consumers=[consumer.name])


@pytest.mark.parametrize("noun", ["stream", "event", "task", "worker"])
def test_a_list_asks_as_much_for_many_rows_as_for_few(admin_client: Client, noun: str):
    counts = []
    for count in (2, 6):
        _make_tasks(count)
        with CaptureQueriesContext(connection) as queries:
            admin_client.get(page(f"{noun}_changelist"))
        counts.append(len(queries))
    assert counts[0] == counts[1]


def test_a_list_of_consumers_asks_one_thing_more_for_each_its_lag(admin_client: Client):
    counts = []
    for count in (2, 6):
        _make_tasks(count)
        with CaptureQueriesContext(connection) as queries:
            admin_client.get(page("consumer_changelist"))
        counts.append(len(queries))
    assert counts[1] - counts[0] == 6


def test_the_pages_of_an_event_and_a_task_ask_a_fixed_number_of_things(
    admin_client: Client, django_assert_max_num_queries: Any
):
    event = EventFactory.create()
    for _ in range(5):
        task = TaskFactory.create(consumer__stream=event.stream, event=event)
    ContentType.objects.get_for_model(Task)  # which Django asks for once, and 6.1 on each page
    with django_assert_max_num_queries(7):
        admin_client.get(page("event_change", event.pk))
    with django_assert_max_num_queries(4):
        admin_client.get(page("task_change", task.pk))


def test_a_few_rows_are_counted_exactly():
    TaskFactory.create_batch(3)
    count = paginator.BoundedPaginator(Task.objects.order_by("pk"), 100).count
    assert (count, type(count), str(count)) == (3, int, "3")


def test_a_long_selection_is_counted_up_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paginator, "COUNT_MAX", 2)
    TaskFactory.create_batch(3)
    count = paginator.BoundedPaginator(Task.objects.available().order_by("pk"), 100).count
    assert (count, type(count), str(count)) == (2, Minimum, "2+")


def test_a_long_table_is_estimated(crowd: Consumer):
    count = paginator.BoundedPaginator(Task.objects.order_by("pk"), 100).count
    assert type(count) is Estimate
    assert count == pytest.approx(MANY, rel=0.1)
    assert str(count).startswith("≈ ")


def test_a_long_table_that_was_never_analyzed_is_at_least_as_long_as_was_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(paginator, "COUNT_MAX", 2)
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE kanthorq_django_worker")
    for _ in range(3):
        Worker.objects.create(host="h", pid=1, concurrency=1)
    assert str(paginator.BoundedPaginator(Worker.objects.order_by("pk"), 100).count) == "≈ 2"


def test_a_list_says_that_its_length_is_estimated(admin_client: Client, crowd: Consumer):
    text = text_of(admin_client.get(page("task_changelist")))
    assert f"≈ {MANY:,} tasks" in text
    assert f"Select all ≈ {MANY:,} tasks" in text


def test_pages_beyond_the_limit_cannot_be_turned_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paginator, "PAGES_MAX", 2)
    TaskFactory.create_batch(3)
    pages = paginator.BoundedPaginator(Task.objects.order_by("pk"), 1)
    assert pages.num_pages == 2
    with pytest.raises(EmptyPage):
        pages.page(3)
