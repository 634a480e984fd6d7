"""The plans of the hot statements, as the server keeps them for a worker and a publisher."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from django.db import connection, transaction

from kanthorq_django import publish, publish_many, sql
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery.cursor import NO_FLOOR, peek
from kanthorq_django.models.delivery.lease import ack, ack_and_commit, renew
from kanthorq_django.models.registration import Registration
from kanthorq_django.sql.binding import numbered

WRITING = ("publish", "pull", "claim", "renew", "ack", "ack_last")
LIMIT = 100


def plans(stream: str) -> dict[str, str]:
    """Return the plan of each hot statement, for 100 new events at the end of a stream."""
    consumer = Consumer.objects.register("late", Registration(stream, [">"], deliver="new"))
    publish_many([Event(subject="new") for _ in range(2 * LIMIT)], stream=stream)
    consumer.pull(LIMIT)
    Task.objects.running().update(state=TaskState.AVAILABLE)  # due at once, for the claim
    Task.objects.available().update(schedule_at="2000-01-01T00:00Z")
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")
    found: dict[str, str] = {}
    with connection.execute_wrapper(_explained_into(found, WRITING)):
        _handle(consumer, stream)
    while consumer.pull(LIMIT):
        pass
    with connection.execute_wrapper(_explained_into(found, ["peek"])):
        peek({consumer.pk: NO_FLOOR}, CLAIMABLE, "default")
    return found


def _handle(consumer: Consumer, stream: str) -> None:
    publish("new", stream=stream)
    leases = [task.lease for task in consumer.claim(LIMIT)]
    consumer.pull(LIMIT)
    renew(dict.fromkeys(leases, timedelta(minutes=1)), "default")
    ack(dict.fromkeys(leases[1:]), "default")
    with transaction.atomic():
        ack_and_commit({leases[0]: None}, "default")


def _explained_into(found: dict[str, str], names: Sequence[str]) -> Callable[..., Any]:
    texts = {sql.load(name): name for name in names}

    def explain(execute: Any, statement: str, params: Any, many: bool, context: Any) -> Any:
        for text, name in texts.items():
            # Others may be sent along with it.
            if text in statement and name not in found:
                found[name] = _plan(name, text, params)
        return execute(statement, params, many, context)

    return explain


def _plan(name: str, text: str, params: Any) -> str:
    """Run a statement by the plan that a worker has, and take back what it did."""
    statement, wanted = numbered(text)
    places = ", ".join(["%s"] * len(wanted))
    # Past Django and its wrappers, of which this is one.
    with connection.connection.cursor() as cursor:
        is_open = connection.in_atomic_block
        cursor.execute("SAVEPOINT explained" if is_open else "BEGIN")
        if name in sql.REPEATED:  # others take long arrays, and are planned for these each time
            cursor.execute(sql.BY_ONE_PLAN.text)
        if name == "pull":
            cursor.execute(sql.load("lock_consumer"), params)
        cursor.execute(f"PREPARE explained AS {statement}")
        cursor.execute(
            "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF, SUMMARY ON) "
            f"EXECUTE explained ({places})",
            [params[param] for param in wanted],
        )
        lines = [line for (line,) in cursor.fetchall()]
        cursor.execute("ROLLBACK TO explained" if is_open else "ROLLBACK")
        cursor.execute("DEALLOCATE explained")
    return "\n".join(lines)
