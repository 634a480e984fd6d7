"""How claims, renewals and verdicts find their rows among many finished ones; not how fast."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models import CharField
from django.db.models.functions import Cast

from kanthorq_django import publish_many
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.states import CLAIMABLE, TaskState
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.models.registration import Registration
from kanthorq_django.sql.binding import numbered
from tests.models.test_pull_plan import nodes

FINISHED = 10_000
LEASED = 100
SHARED = 20
HOUR = timedelta(hours=1)

pytestmark = pytest.mark.django_db


@pytest.fixture
def consumer() -> Consumer:
    """A consumer with many finished tasks, some leased ones and as many that are due."""
    consumer = Consumer.objects.register("reader", Registration("large", includes=[">"]))
    add_tasks(consumer, TaskState.COMPLETED, FINISHED, -HOUR)
    add_tasks(consumer, TaskState.RUNNING, LEASED, HOUR)
    add_tasks(consumer, TaskState.AVAILABLE, LEASED, -HOUR)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE kanthorq_django_event, kanthorq_django_task")
    return consumer


def add_tasks(consumer: Consumer, state: TaskState, count: int, due_in: timedelta) -> None:
    publish_many([Event(subject="a.b") for _ in range(count)], stream="large")
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO kanthorq_django_task (
                consumer_id, event_id, resource_key, state, schedule_at, attempt_count, lease_epoch,
                attempted_at, finalized_at
            )
            SELECT
                %(consumer)s, id, '', %(state)s, statement_timestamp() + %(due_in)s::interval, 1, 1,
                statement_timestamp(), CASE %(state)s WHEN 101 THEN statement_timestamp() END
            FROM kanthorq_django_event AS event
            WHERE NOT EXISTS (SELECT FROM kanthorq_django_task WHERE event_id = event.id)
            """,
            {"consumer": consumer.pk, "state": state, "due_in": str(due_in)},
        )


def leases(count: int) -> list[Lease]:
    return [task.lease for task in Task.objects.running()[:count]]


def renew() -> None:
    lease.renew(dict.fromkeys(leases(LEASED), timedelta(minutes=1)), "default")


def ack() -> None:
    lease.ack(dict.fromkeys(leases(LEASED)), "default", skip_locked=True)


def ack_one() -> None:
    lease.ack(dict.fromkeys(leases(1)), "default")


def ack_last() -> None:
    lease.ack_and_commit(dict.fromkeys(leases(1)), "default")


def ack_group() -> None:
    lease.ack_and_commit(dict.fromkeys(leases(SHARED)), "default")


def nack() -> None:
    failed = dict.fromkeys(leases(LEASED), lease.Failed(Failure("no")))
    lease.nack(failed, "default", skip_locked=True)


def hand_back() -> None:
    lease.hand_back(leases(LEASED), "default", skip_locked=True)


def last_states() -> None:
    lease.last_states(leases(LEASED), "default")


def last_state() -> None:
    lease.last_states(leases(1), "default")


def claim() -> None:
    claim_due(Consumer.objects.get(), LEASED, CLAIMABLE)


VERBS = (renew, ack, ack_one, ack_last, ack_group, nack, hand_back, last_states, last_state, claim)
PRIMARY_KEY = "kanthorq_django_task_pkey"
OURS = ("UPDATE kanthorq_django_task", "attempted_at IS NOT DISTINCT FROM")
INDEXES = {claim: {PRIMARY_KEY, "kanthorq_task_due"}}


class Explained(Exception):
    """Takes back what was explained."""


def plan_of(verb: Callable[[], None], *, is_kept: bool) -> dict[str, Any]:
    """Return how ``verb`` finds what it writes, by the plan the server keeps or makes for it."""
    found: list[Any] = []

    def explain(execute: Any, statement: str, params: Any, *rest: Any) -> Any:
        if not any(part in statement for part in OURS):
            return execute(statement, params, *rest)
        text, names = numbered(statement.removesuffix("COMMIT;"))
        mode = "force_generic_plan" if is_kept else "force_custom_plan"
        places = ", ".join(["%s"] * len(names))
        with connection.connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL plan_cache_mode = {mode}")
            cursor.execute(f"PREPARE explained AS {text}")
            cursor.execute(
                f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE explained ({places})",
                [params[name] for name in names],
            )
            found.extend(cursor.fetchone()[0])
            cursor.execute("DEALLOCATE explained")
        raise Explained

    with pytest.raises(Explained), transaction.atomic(), connection.execute_wrapper(explain):
        verb()
    plan: dict[str, Any] = found[0]["Plan"]
    return plan


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "made"])
@pytest.mark.parametrize("verb", VERBS)
def test_rows_are_found_by_an_index_whatever_is_finished(
    verb: Callable[[], None], is_kept: bool, consumer: Consumer
):
    plan = list(nodes(plan_of(verb, is_kept=is_kept)))
    reads = [node for node in plan if node.get("Relation Name") == "kanthorq_django_task"]
    reads = [node for node in reads if node["Node Type"] != "ModifyTable" and node["Actual Loops"]]
    # By a bitmap where statistics say so: it is an index that is read as well.
    assert {node["Node Type"] for node in reads} <= {"Index Scan", "Bitmap Heap Scan"}
    names = {node.get("Index Name", "") for node in plan if node["Actual Loops"]}
    names = {name for name in names if name.startswith(("kanthorq_task", "kanthorq_django_task"))}
    assert names
    assert names <= INDEXES.get(verb, {PRIMARY_KEY})
    assert all(node["Actual Rows"] <= LEASED for node in plan if node["Node Type"] == "Sort")


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "made"])
def test_a_claim_by_turns_looks_once_at_each_task(is_kept: bool, consumer: Consumer):
    Consumer.objects.update(serialize="on")
    Task.objects.available().update(turn_key=Cast("id", CharField()))
    plan = list(nodes(plan_of(claim, is_kept=is_kept)))
    reads = [node for node in plan if node.get("Relation Name") == "kanthorq_django_task"]
    read = [
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in reads
    ]
    assert read
    assert max(read) <= LEASED
