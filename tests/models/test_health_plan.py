"""How health looks at tasks: by indexes, however many are completed."""

import json
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection

from kanthorq_django import sql
from tests.factories import ConsumerFactory
from tests.models.test_pull_plan import nodes

pytestmark = pytest.mark.django_db

# Two in 1,000 are due, one of them with a key whose turn it may be; all others are completed.
TASKS = """
    INSERT INTO kanthorq_django_task
        (consumer_id, event_id, state, schedule_at, finalized_at, turn_key)
    SELECT %s, gen_random_uuid(), CASE WHEN n %% 500 = 0 THEN 2 ELSE 101 END,
        statement_timestamp() - interval '1 hour',
        CASE WHEN n %% 500 > 0 THEN statement_timestamp() END,
        CASE WHEN n %% 1000 = 0 THEN 'key' END
    FROM generate_series(1, 60000) AS n
"""
PARAMS: dict[str, Any] = {"stuck_after": timedelta(minutes=1), "looked_at": 10_000}


@pytest.fixture
def many_completed(db: None) -> None:
    """A consumer with 120 stuck tasks and very many completed ones."""
    with connection.cursor() as cursor:
        # A new file for this transaction, or the planner would go by what other tests left.
        cursor.execute("TRUNCATE kanthorq_django_task")
        cursor.execute(TASKS, [ConsumerFactory.create().pk])
        cursor.execute("ANALYZE kanthorq_django_task")


def plan_of(statement: str) -> list[dict[str, Any]]:
    """Return all nodes of the plan of ``statement``."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (FORMAT JSON) {sql.load(statement)}", PARAMS)
        (explained,) = cursor.fetchone()
    (plan,) = explained if isinstance(explained, list) else json.loads(explained)
    return list(nodes(plan["Plan"]))


def test_the_health_of_consumers_is_read_from_partial_indexes(many_completed: None):
    plan = plan_of("health_consumers")
    read = [node for node in plan if node.get("Relation Name") == "kanthorq_django_task"]
    used = {node["Index Name"] for node in plan if "Index Name" in node}
    assert "Seq Scan" not in {node["Node Type"] for node in read}
    assert {"kanthorq_task_due", "kanthorq_task_turn_due"} <= used


def test_stuck_tasks_are_counted_with_turns_and_without(many_completed: None):
    (row,) = sql.rows("default", "health_consumers", PARAMS)
    assert row.stuck_count == 120
    assert row.oldest_due >= timedelta(hours=1)
