"""Whether everything is fit to work: the server, the tables, the workers and the backlog."""

import json
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections
from django.db.migrations.executor import MigrationExecutor
from psycopg.errors import LockNotAvailable

from kanthorq_django import sql
from kanthorq_django.domain.subscriptions import registry
from kanthorq_django.models.consumer import Consumer
from kanthorq_django.models.delivery.cursor import Lag
from kanthorq_django.models.isolation import waiting_at_most
from kanthorq_django.models.worker import Worker

VERSION_MIN = 15  # of PostgreSQL
DEAD_MIN = 10_000  # dead rows of a table below which they are nobody's concern
LOOKED_AT = 10_000  # overdue tasks, with turns and without, among which stuck ones are counted
LOCKED = "another session holds a lock for too long; pg_locks tells which one"
LOCKED_TIMEOUT = timedelta(milliseconds=100)  # of what is looked at after that
APP_LABEL = "kanthorq_django"


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"  # something that it needs has failed


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do if it failed."""

    check: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is still healthy."""

    workers: int = 1  # alive, at least
    lag: timedelta = timedelta(minutes=5)  # age of a consumer's oldest unread event
    due: timedelta = timedelta(minutes=5)  # how long a due task may have to wait
    stuck: timedelta = timedelta(minutes=1)  # how long after its lease's end a task may hang
    queue_usage: float = 0.1  # of 1; when it is full, commits fail
    transaction: timedelta = timedelta(hours=1)  # age of the oldest one, prepared or not
    dead_rows: float = 0.5  # of a table's rows; vacuum removes them, unless it is held up
    pinned: timedelta = timedelta(days=7)  # age of events kept for who has not read them


def examine(
    using: str,
    limits: Limits | None = None,
    *,
    consumers: Collection[str] = (),
    skip: Collection[str] = (),
    lock_timeout: timedelta | None = None,
) -> list[Finding]:
    """Return what each check of ``CHECKS`` found, but for those named in ``skip``.

    Of consumers that code declares only those named in ``consumers`` are looked at, if any are:
    others may be at home in another database. With a ``lock_timeout`` a check that waits longer
    for a lock has failed.
    """
    patient = _Patient(using, limits or Limits(), lock_timeout, set(consumers))
    findings: list[Finding] = []
    is_fit = True
    for name, check in CHECKS.items():
        if name in skip:
            continue
        finding = _run(name, check, patient) if is_fit else _skipped(name)
        findings.append(finding)
        if name in PREREQUISITES and finding.status is Status.FAILED:
            is_fit = False
    return findings


@dataclass
class _Patient:
    """The database under examination; what several checks look at is asked for once."""

    using: str
    limits: Limits
    lock_timeout: timedelta | None = None
    named: set[str] = field(default_factory=set)
    declared: set[str] = field(
        default_factory=lambda: {subscription.consumer for subscription in registry.all()}
    )

    @cached_property
    def expected(self) -> set[str]:
        """The consumers whose work somebody here is to do."""
        return self.named or self.declared

    @cached_property
    def server(self) -> Any:
        return sql.rows(self.using, "health_server", {})[0]

    @cached_property
    def growth(self) -> Any:
        return sql.rows(self.using, "health_growth", {"dead_min": DEAD_MIN})[0]

    @cached_property
    def consumers(self) -> list[Any]:
        params = {"stuck_after": self.limits.stuck, "looked_at": LOOKED_AT}
        return sql.rows(self.using, "health_consumers", params)

    @cached_property
    def lags(self) -> dict[str, Lag]:
        consumers = Consumer.objects.using(self.using).order_by("name")
        return {consumer.name: consumer.lag() for consumer in consumers}

    def look(self) -> AbstractContextManager[None]:
        """Run the block of one check, which waits for no lock longer than ``lock_timeout``."""
        if self.lock_timeout is None:
            return nullcontext()
        return waiting_at_most(self.using, self.lock_timeout)

    def own(self) -> list[Any]:
        """Return the consumers that are expected; of those without code ``_orphans()`` tells."""
        return [row for row in self.consumers if row.name in self.expected]


Verdict = tuple[bool, str]


def _run(name: str, check: Callable[[_Patient], Verdict], patient: _Patient) -> Finding:
    try:
        with patient.look():
            is_ok, detail = check(patient)
    except (Error, ImproperlyConfigured) as error:
        if isinstance(error.__cause__, LockNotAvailable):
            # The checks that follow may meet the same lock; all together they would take too long.
            patient.lock_timeout = LOCKED_TIMEOUT
            return Finding(name, Status.FAILED, LOCKED)
        return Finding(name, Status.FAILED, " ".join(str(error).split()))
    return Finding(name, Status.OK if is_ok else Status.FAILED, detail)


def _skipped(name: str) -> Finding:
    return Finding(name, Status.SKIPPED, "not looked at: an earlier check failed")


def _database(patient: _Patient) -> Verdict:
    return True, f"PostgreSQL {patient.server.version_name} answers"


def _version(patient: _Patient) -> Verdict:
    return (
        patient.server.version >= VERSION_MIN,
        f"PostgreSQL {patient.server.version}, where {VERSION_MIN} or later is needed",
    )


def _primary(patient: _Patient) -> Verdict:
    if patient.server.is_standby:
        return False, "this is a standby, which cannot be pulled from; use the primary"
    return True, "not a standby"


def _migrations(patient: _Patient) -> Verdict:
    executor = MigrationExecutor(connections[patient.using])
    targets = [node for node in executor.loader.graph.leaf_nodes() if node[0] == APP_LABEL]
    # Those of other apps that ours depend on would be in the plan too.
    missing = [migration.name for migration, _ in executor.migration_plan(targets)]
    if missing:
        return False, f"{', '.join(missing)} not applied; run manage.py migrate"
    return True, "all applied"


def _cluster(patient: _Patient) -> Verdict:
    foreign = [row.name for row in patient.consumers if row.is_foreign]
    if foreign:
        return False, (
            f"cursors of another cluster: {', '.join(foreign)}; stop the workers and run "
            "manage.py kanthorq rebase"
        )
    return True, "every cursor is of this cluster"


def _workers(patient: _Patient) -> Verdict:
    workers = Worker.objects.using(patient.using)
    alive, dead = workers.alive().count(), workers.dead().count()
    wanted = patient.limits.workers
    return alive >= wanted, f"{alive} alive, {dead} gone silent; at least {wanted} wanted"


def _stuck(patient: _Patient) -> Verdict:
    stuck = [f"{row.name} {row.stuck_count:,}" for row in patient.own() if row.stuck_count]
    if stuck:
        return False, f"leases that ran out unnoticed: {', '.join(stuck)}; is a worker running?"
    return True, "no task is stuck"


def _due(patient: _Patient) -> Verdict:
    return _oldest(
        "due tasks", ((row.name, row.oldest_due) for row in patient.own()), patient.limits.due
    )


def _lag(patient: _Patient) -> Verdict:
    lags = ((name, lag.oldest) for name, lag in patient.lags.items() if name in patient.expected)
    return _oldest("unread events", lags, patient.limits.lag)


def _declared(patient: _Patient) -> Verdict:
    unknown = sorted(patient.expected - {row.name for row in patient.consumers})
    if unknown:
        return False, (
            f"not known to the database: {', '.join(unknown)}; start a worker, or run "
            "manage.py kanthorq sync"
        )
    return True, "every consumer that code declares is known to the database"


def _orphans(patient: _Patient) -> Verdict:
    waiting = [
        row.name
        for row in patient.consumers
        if row.name not in patient.declared and (row.oldest_due or patient.lags[row.name].count)
    ]
    if waiting:
        return False, f"work waits for consumers that no code declares: {', '.join(waiting)}"
    return True, "no work waits for a consumer without code"


def _streams(patient: _Patient) -> Verdict:
    unread = [row.name for row in sql.rows(patient.using, "health_streams", {})]
    if unread:
        return False, f"no consumer reads what is published into {', '.join(map(repr, unread))}"
    return True, "every stream that holds events has a consumer"


def _notifications(patient: _Patient) -> Verdict:
    usage, limit = patient.server.queue_usage, patient.limits.queue_usage
    return usage <= limit, f"{usage:.1%} of the notification queue used, {limit:.0%} allowed"


def _transactions(patient: _Patient) -> Verdict:
    age = patient.server.oldest_transaction or timedelta(0)
    told = f"the oldest is open for {_rounded(age)}, {_rounded(patient.limits.transaction)} allowed"
    if not patient.server.sees_all_sessions:
        told += "; others' are hidden from this role, which lacks pg_read_all_stats"
    return age <= patient.limits.transaction, told


def _prepared(patient: _Patient) -> Verdict:
    gid, age = patient.growth.prepared_gid, patient.growth.prepared_age
    if age is None or age <= patient.limits.transaction:
        return True, "no prepared transaction is forgotten"
    return False, (
        f"{gid!a} is prepared for {_rounded(age)}, which keeps vacuum from all tables; COMMIT "
        "PREPARED or ROLLBACK PREPARED ends it"
    )


def _dead_rows(patient: _Patient) -> Verdict:
    bloated = [
        f"{table} {dead:,} of {dead + live:,}"
        for table, (dead, live) in sorted(json.loads(patient.growth.dead_rows).items())
        if dead > patient.limits.dead_rows * (dead + live)
    ]
    if bloated:
        return False, f"dead rows: {', '.join(bloated)}; does autovacuum keep up?"
    return True, f"at most {patient.limits.dead_rows:.0%} of each table's rows are dead"


def _pinned(patient: _Patient) -> Verdict:
    ages = ((name, lag.oldest) for name, lag in patient.lags.items())
    return pinned(ages, patient.limits.pinned)


def pinned(ages: Iterable[tuple[str, timedelta | None]], limit: timedelta) -> Verdict:
    """Tell whether all consumers have read what is older than ``limit``, and if not, who has not.

    ``ages`` are those of the oldest event that each has not read.
    """
    is_ok, detail = _oldest("unread events", ages, limit)
    return is_ok, detail if is_ok else f"prune has to keep events: {detail}"


def _oldest(what: str, ages: Iterable[tuple[str, timedelta | None]], limit: timedelta) -> Verdict:
    late = [f"{name} {_rounded(age)}" for name, age in ages if age is not None and age > limit]
    if late:
        return False, f"{what} wait longer than {_rounded(limit)}: {', '.join(late)}"
    return True, f"no {what} wait longer than {_rounded(limit)}"


def _rounded(age: timedelta) -> str:
    """Return ``age`` to the second; whole days without their hours."""
    return str(timedelta(seconds=round(age.total_seconds()))).removesuffix(", 0:00:00")


CHECKS: dict[str, Callable[[_Patient], Verdict]] = {
    "database": _database,
    "version": _version,
    "primary": _primary,
    "migrations": _migrations,
    "cluster": _cluster,
    "workers": _workers,
    "stuck": _stuck,
    "due": _due,
    "lag": _lag,
    "declared": _declared,
    "orphans": _orphans,
    "streams": _streams,
    "notifications": _notifications,
    "transactions": _transactions,
    "prepared": _prepared,
    "dead_rows": _dead_rows,
    "pinned": _pinned,
}
# What grows without a bound if nobody looks.
GROWTH = frozenset({"notifications", "transactions", "prepared", "dead_rows", "pinned"})
PREREQUISITES = frozenset({"database", "version", "migrations"})
