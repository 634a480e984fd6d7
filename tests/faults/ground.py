"""A PostgreSQL server to do anything with, and what its databases look like from outside."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
from django.core.management import call_command
from django.db import connections

from project.postgres.cluster import PORT, USER
from tests.clusters.throwaway import MIGRATED, Cluster
from tests.faults.facts import (
    FINAL,
    Effect,
    EventRow,
    TaskRow,
)
from tests.ledger.models import Entry

EVENTS = """
    SELECT event.id::text, subject,
        coalesce(event.metadata ->> 'schedule', ''), coalesce(event.metadata ->> 'occurrence', '')
    FROM kanthorq_django_event AS event
"""
TASKS = """
    SELECT task.id, consumer.name, task.event_id::text, task.state, task.lease_epoch,
        task.attempt_count,
        jsonb_array_length(jsonb_path_query_array(
            task.attempted_errors, '$[*] ? (@.verb == "handle")'
        )),
        jsonb_array_length(jsonb_path_query_array(
            task.attempted_errors, '$[*] ? (@.error starts with "The lease ran out")'
        )),
        -- What is due later has no place in the order of its key until then.
        CASE WHEN event.schedule_at IS NULL THEN task.resource_key ELSE '' END
    FROM kanthorq_django_task AS task
    JOIN kanthorq_django_consumer AS consumer ON consumer.id = task.consumer_id
    LEFT JOIN kanthorq_django_event AS event ON event.id = task.event_id
    ORDER BY task.id
"""
EFFECTS = "SELECT event_id::text, note FROM ledger_entry ORDER BY id"
# Tasks that are owed and not there yet, and tasks that are there and not final.
UNSETTLED = """
    SELECT
        (
            SELECT count(*) FROM kanthorq_django_event AS event
            JOIN kanthorq_django_consumer AS consumer
                ON event.subject LIKE replace(consumer.subject_includes ->> 0, '>', '%')
            WHERE NOT EXISTS (
                SELECT FROM kanthorq_django_task AS task
                WHERE task.event_id = event.id AND task.consumer_id = consumer.id
            )
        )
        + (SELECT count(*) FROM kanthorq_django_task WHERE state NOT IN (101, -101, -102))
        + (
            SELECT count(*) FROM kanthorq_django_schedule
            WHERE next_at < statement_timestamp() AND cancelled_at IS NULL
        )
"""
LEFT = """
    SELECT format('connection %s, %s: %s', pid, state, left(query, 60)) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend'
    UNION ALL
    SELECT format('prepared transaction %s', gid) FROM pg_prepared_xacts
    WHERE database = current_database()
    UNION ALL
    SELECT format('worker %s', pid) FROM kanthorq_django_worker
    WHERE seen_at > statement_timestamp() - interval '5 seconds'
"""


class Ground(Cluster):
    """A cluster whose databases have the ledger as well."""

    def create(self, name: str) -> None:
        """Make a database that stays as long as its server."""
        self.execute(f"CREATE DATABASE {name} TEMPLATE {self._template}")

    @functools.cached_property
    def _template(self) -> str:
        self.execute(f"CREATE DATABASE {MIGRATED}")
        with self.alias(MIGRATED):
            call_command("migrate", "kanthorq_django", database=MIGRATED, verbosity=0)
            with connections[MIGRATED].schema_editor() as editor:
                editor.create_model(Entry)
        return MIGRATED


class View:
    """What a database holds, read past everything that is on trial."""

    def __init__(self, host: Path | str, name: str) -> None:
        self.host, self.name = str(host), name

    def url(self, host: str = "", port: int | str = PORT, user: str = USER, **options: str) -> str:
        """Return the DATABASE_URL of this database, or of another road to it."""
        place = {"host": host or self.host, "port": str(port)} | options
        return f"postgresql://{user}@/{self.name}?{urlencode(place, quote_via=quote)}"

    @contextmanager
    def session(self, **options: Any) -> Iterator["psycopg.Connection[Any]"]:
        """A connection of one's own, in autocommit; waits a while for a server that restarts."""
        deadline = time.monotonic() + 20
        while True:
            try:
                made = psycopg.connect(self.url(), autocommit=True, connect_timeout=5, **options)
                break
            except psycopg.OperationalError:  # down, or not up again yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        with made:
            yield made

    def rows(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with self.session() as session:
            return session.execute(statement, params or None).fetchall()

    def value(self, statement: str, *params: Any) -> Any:
        ((value,),) = self.rows(statement, *params)
        return value

    def execute(self, statement: str, *params: Any) -> None:
        with self.session() as session:
            session.execute(statement, params or None)

    def backends(self, pattern: str = "") -> list[int]:
        """Return the processes that serve this database, by what they last were asked: a regex."""
        found = self.rows(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            " AND query ~ %s ORDER BY pid",
            pattern,
        )
        return [pid for (pid,) in found]

    def consumers(self) -> list[str]:
        return [name for (name,) in self.rows("SELECT name FROM kanthorq_django_consumer")]

    def events(self) -> list[EventRow]:
        names = ("id", "subject", "schedule", "occurrence")
        return [EventRow(**dict(zip(names, row, strict=True))) for row in self.rows(EVENTS)]

    def tasks(self) -> list[TaskRow]:
        names = [field.name for field in fields(TaskRow)]
        return [TaskRow(**dict(zip(names, row, strict=True))) for row in self.rows(TASKS)]

    def effects(self) -> list[Effect]:
        return [_effect(event, note) for event, note in self.rows(EFFECTS)]

    def unsettled(self) -> int:
        """Return how many tasks are still to be made or to be finished."""
        return int(self.value(UNSETTLED))

    def open(self) -> list[str]:
        """Return the first tasks that are not final, for who has to find out why."""
        return [str(task) for task in self.tasks() if task.state not in FINAL][:5]

    def left(self) -> list[str]:
        """Return the connections and prepared transactions of this database but our own."""
        return [what for (what,) in self.rows(LEFT)]


def _effect(event: str, note: str) -> Effect:
    kind, _, rest = note.partition(" ")
    consumer, _, epoch = rest.partition(" ")
    return Effect(kind=kind, event=event, consumer=consumer, epoch=int(epoch or 0))
