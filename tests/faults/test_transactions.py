"""Transactions that stay open, conflict, deadlock, or are forgotten."""

import time

import psycopg
import pytest

from tests.faults.stage import LEASE_SECONDS, Stage
from tests.quick_run import sooner

OPEN = {
    "a long write": ("BEGIN", "SELECT pg_current_xact_id()"),
    "a long report": (
        "BEGIN ISOLATION LEVEL REPEATABLE READ",
        "SELECT count(*) FROM kanthorq_django_event",
    ),
    "a forgotten prepared transaction": (
        "BEGIN",
        "SELECT pg_current_xact_id()",
        "PREPARE TRANSACTION 'forgotten'",
    ),
}


@pytest.mark.parametrize("what", sooner(OPEN, "a long write"))
def test_a_transaction_that_stays_open_delays_nobody(stage: Stage, what: str):
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    with stage.view.session() as session:
        for statement in OPEN[what]:
            session.execute(statement)
        client.do("both 20")
        client.do("say order.last")
        seconds = stage.settle()
        session.execute("ROLLBACK" if "PREPARE" not in OPEN[what][-1] else ROLL_BACK_PREPARED)

    stage.record(f"{what} stays open: everything handled", seconds=seconds)
    stage.check()


ROLL_BACK_PREPARED = "ROLLBACK PREPARED 'forgotten'"


def test_what_commits_late_is_delivered_and_holds_up_nobody(stage: Stage):
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    for _ in range(3):
        client.do("straddle")

    stage.settle()

    stage.check()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_a_stricter_default_isolation_changes_nothing(stage: Stage, level: str):
    name = stage.view.name
    stage.view.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    stage.worker()
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    client.do("both 40")
    client.do("tick 5")

    stage.settle()

    stage.check()


@pytest.mark.slow
def test_deadlocks_with_others_are_survived(stage: Stage):
    """Handlers lock the business table and then tasks; somebody else does it the other way."""
    stage.view.execute(f"ALTER DATABASE {stage.view.name} SET deadlock_timeout = '100ms'")
    stage.worker()
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    client.begin("both 60")
    deadlocks = 0
    with stage.view.session() as session:
        for _ in range(20):
            try:
                session.execute("BEGIN")
                session.execute("LOCK TABLE kanthorq_django_task IN SHARE ROW EXCLUSIVE MODE")
                session.execute("LOCK TABLE ledger_entry IN SHARE ROW EXCLUSIVE MODE")
            except psycopg.errors.DeadlockDetected:
                deadlocks += 1
            session.execute("ROLLBACK")
            time.sleep(0.02)
    client.wait()

    stage.settle()

    told = stage.view.value(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    stage.record("deadlocks with others", count=max(told, deadlocks))
    stage.check()


LOCKS = {
    "all tasks": "LOCK TABLE kanthorq_django_task IN ACCESS EXCLUSIVE MODE",
    "the tasks' rows": "SELECT FROM kanthorq_django_task FOR UPDATE",
    "the consumers": "SELECT FROM kanthorq_django_consumer FOR UPDATE",
    "the events": "LOCK TABLE kanthorq_django_event IN ACCESS EXCLUSIVE MODE",
}


@pytest.mark.parametrize("what", sooner(LOCKS, "all tasks"))
def test_what_somebody_locks_for_longer_than_a_lease_goes_on_afterwards(stage: Stage, what: str):
    worker = stage.worker()
    client = stage.client()
    stage.wait_until_started()
    client.do("both 10")
    client.begin("both 20")
    with stage.view.session() as session, session.transaction():
        session.execute(LOCKS[what])
        time.sleep(1.5 * LEASE_SECONDS)  # what is on trial is time that passes
    client.wait()

    stage.settle()

    assert worker.is_running
    stage.check()
