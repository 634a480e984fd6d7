"""Transactions of others that lock, stay open, are forgotten, or get into a deadlock."""

import itertools
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.mischief.registry import fault
from tests.faults.stage import LEASE_SECONDS
from tests.faults.test_transactions import LOCKS, OPEN

if TYPE_CHECKING:
    from tests.faults.turmoil import Turmoil

OPEN_SECONDS = 8.0
# What a forgotten transaction holds, nobody gets; and behind who waits for a table all others wait.
IMPATIENT = "SET lock_timeout = '2s'"
TRANSACTIONS = [statements for what, statements in OPEN.items() if "prepared" not in what]
_forgotten = itertools.count()


@fault
def lock_something(soak: "Turmoil") -> Any:
    with suppress(psycopg.Error), soak.stage.view.session() as session, session.transaction():
        session.execute(IMPATIENT)
        session.execute(soak.chance.choice(sorted(LOCKS.values())))
        time.sleep(soak.chance.uniform(0.2, 1.5 * LEASE_SECONDS))


@fault
def leave_a_transaction_open(soak: "Turmoil") -> Any:
    """A long write or a long report, in the background."""
    statements = soak.chance.choice(TRANSACTIONS)

    def hold() -> None:
        with suppress(psycopg.Error), soak.stage.view.session() as session:
            for statement in statements:
                session.execute(statement)
            soak.over.wait(OPEN_SECONDS)
            session.execute("ROLLBACK")

    soak.later(0, hold)


@fault
def forget_a_prepared_transaction(soak: "Turmoil") -> Any:
    """It holds an event, survives whatever the server does, and is remembered much later."""
    name = f"forgotten_{next(_forgotten)}"
    soak.order(f"forget {name}")
    soak.forgotten.append((time.monotonic() + soak.chance.uniform(5, 30), name))


@fault
def cause_deadlocks(soak: "Turmoil") -> Any:
    """Handlers lock the business table and then tasks; this does it the other way."""
    for _ in range(5):
        with suppress(psycopg.Error), soak.stage.view.session() as session:
            session.execute(IMPATIENT)
            session.execute("BEGIN")
            session.execute("LOCK TABLE kanthorq_django_task IN SHARE ROW EXCLUSIVE MODE")
            session.execute("LOCK TABLE ledger_entry IN SHARE ROW EXCLUSIVE MODE")
            session.execute("ROLLBACK")


@fault
def let_schedules_be_late(soak: "Turmoil") -> Any:
    soak.order("tick 20")


@fault
def commit_late(soak: "Turmoil") -> Any:
    soak.order("straddle")
