"""A worker on a server of its own: one that restarts under load, and one that rests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from django.core.management import call_command
from django.db import Error, connections
from pytest_django import DjangoDbBlocker

from kanthorq_django import publish
from kanthorq_django.models import Task
from kanthorq_django.worker import renewer
from project.postgres.launcher import scratch_server
from tests.clusters.throwaway import Cluster
from tests.concurrency import begin_elsewhere, elsewhere, wait_until
from tests.ledger.models import Entry
from tests.processes import PATIENCE, runworker
from tests.worker.working import accept, default_database, working


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with scratch_server() as server:
        yield Cluster(server)


@pytest.fixture
def database(cluster: Cluster, django_db_blocker: DjangoDbBlocker) -> Iterator[str]:
    """The alias of a new database with all tables in ``cluster``."""
    with django_db_blocker.unblock(), cluster.database() as alias:
        call_command("migrate", database=alias, run_syncdb=True, verbosity=0)
        connections[alias].close()
        yield alias


class Publisher:
    """Publishes all the time, whatever the server does."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._stop = threading.Event()
        self.published: set[UUID] = set()

    def run(self) -> None:
        while not self._stop.wait(0.005):
            try:
                event = publish("entry.made", stream="ledger", using=self._using)
            except Error:
                connections[self._using].close()
            else:
                self.published.add(event.pk)

    @contextmanager
    def running(self) -> Iterator[None]:
        run = begin_elsewhere(self.run)
        try:
            yield
        finally:
            self._stop.set()
            run.result(PATIENCE)


def entries(using: str) -> list[UUID]:
    """Return the events whose entries are there, as often as they are; none while it is away."""
    try:
        return list(Entry.objects.using(using).values_list("event_id", flat=True))
    except Error:
        connections[using].close()
        return []


@pytest.mark.parametrize("mode", [pytest.param("fast", marks=pytest.mark.slow), "immediate"])
def test_a_worker_outlives_a_restart_of_the_server_under_load(
    cluster: Cluster, database: str, mode: Any
):
    publisher = Publisher(database)
    url = {"DATABASE_URL": cluster.server.dsn, "TESTED_DATABASE": database}
    with runworker("atomic", **url) as worker, publisher.running():
        wait_until(lambda: len(entries(database)) > 50, PATIENCE)
        for _ in range(2):
            cluster.server.restart(mode)
            known = len(entries(database))
            wait_until(lambda known=known: len(entries(database)) > known + 20, 10)  # type: ignore[misc]
        publisher._stop.set()
        wait_until(lambda: set(entries(database)) >= publisher.published, PATIENCE)
        assert worker.terminate() == 0
    found = entries(database)
    assert len(found) == len(set(found))
    assert not Task.objects.using(database).exclude(state=101).exists()


class Work(NamedTuple):
    """What a server has done so far in a database, and written at all."""

    transactions: int
    rows_written: int
    next_xid: int
    wal: str


def work_of(cluster: Cluster, database: str) -> Work:
    with connections[database].cursor() as cursor:
        cursor.execute(
            "SELECT xact_commit + xact_rollback, tup_inserted + tup_updated + tup_deleted,"
            " pg_current_wal_insert_lsn()::text FROM pg_stat_database"
            " WHERE datname = current_database()"
        )
        transactions, written, wal = cursor.fetchone()
    return Work(transactions, written, cluster.next_xid(), wal)


def is_at_rest(cluster: Cluster, database: str, windows: list[str]) -> bool:
    """Tell whether for some seconds nothing was written, in three transactions a second at most.

    Backends report what they did up to ten seconds late, and the server itself writes now and
    then: one quiet window is enough, which a worker that spins would never leave.
    """
    seconds = 3
    before = work_of(cluster, database)
    threading.Event().wait(seconds)
    after = work_of(cluster, database)
    windows.append(f"{before} to {after}")
    return after.transactions - before.transactions <= 3 * seconds and before[1:] == after[1:]


def test_a_worker_at_rest_asks_little_and_writes_nothing(
    cluster: Cluster, database: str, monkeypatch: pytest.MonkeyPatch
):
    """Beyond the row that tells every ten seconds that it is alive."""
    monkeypatch.setattr(renewer, "SEEN_EVERY", timedelta(hours=1))
    accept("rests")
    place = {name: connections[database].settings_dict[name] for name in ("HOST", "PORT", "USER")}
    rested: dict[str, Any] = {"listen": True, "poll_interval": timedelta(seconds=1)}
    windows: list[str] = []
    with default_database(NAME=database, **place), working("rests", **rested):
        elsewhere(lambda: publish("work.due", stream="work"))
        wait_until(lambda: elsewhere(Task.objects.completed().exists), PATIENCE)
        assert any(is_at_rest(cluster, database, windows) for _ in range(6)), windows
