"""The plans of the hot statements, as they run in a worker's steps."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import connection
from psycopg.pq import TransactionStatus

from kanthorq_django import publish_many, sql
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.lease import ack, renew
from kanthorq_django.models.registration import Registration

STATEMENTS = ("pull", "claim", "ack", "renew")
LIMIT = 100


def plans(stream: str) -> dict[str, str]:
    """Return the plan of each hot statement, for 100 new events at the end of a stream."""
    found: dict[str, str] = {}
    consumer = Consumer.objects.register("late", Registration(stream, [">"], deliver="new"))
    publish_many([Event(subject="new") for _ in range(2 * LIMIT)], stream=stream)
    consumer.pull(LIMIT)
    Task.objects.running().update(state=1)  # due at once, for the claim
    Task.objects.available().update(schedule_at="2000-01-01T00:00Z")
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")
    with connection.execute_wrapper(_explained_into(found)):
        claimed = consumer.claim(LIMIT)
        consumer.pull(LIMIT)
        leases = [task.lease for task in claimed]
        renew(dict.fromkeys(leases, timedelta(minutes=1)), "default")
        ack(dict.fromkeys(leases), "default")
    return found


def _explained_into(found: dict[str, str]) -> Callable[..., Any]:
    texts = {name: sql.load(name) for name in STATEMENTS}

    def explain(execute: Any, statement: str, params: Any, many: bool, context: Any) -> Any:
        for name, text in texts.items():
            # Others may be sent along with it.
            if text in statement and name not in found and not statement.startswith("EXPLAIN"):
                before = sql.load("lock_consumer") if name == "pull" else ""
                found[name] = _plan(before, text, params)
        return execute(statement, params, many, context)

    return explain


def _plan(before: str, statement: str, params: Any) -> str:
    """Run the statement with EXPLAIN, after another one if need be, and take back what it did."""
    is_open = connection.connection.info.transaction_status != TransactionStatus.IDLE
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT explained" if is_open else "BEGIN")
        if before:
            cursor.execute(before, params)
        cursor.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF, SUMMARY ON) {statement}", params
        )
        lines = [line for (line,) in cursor.fetchall()]
        cursor.execute("ROLLBACK TO explained" if is_open else "ROLLBACK")
    return "\n".join(lines)
