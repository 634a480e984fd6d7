"""Clusters and database aliases made for a test: to crash, to dump, to restore."""

import functools
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.db import connections

from project.postgres.cluster import PORT, USER
from project.postgres.launcher import Server

MIGRATED = "migrated"  # the database that the others are copies of


@contextmanager
def database_alias(name: str, **settings: Any) -> Iterator[str]:
    """Yield a new alias for the default database, or for what ``settings`` say instead.

    Threads that use it close their own connections.
    """
    default = connections["default"]
    if not settings:
        default.ensure_connection()  # the embedded server then has told where it is
    connections.settings[name] = {**default.settings_dict, **settings}
    try:
        yield name
    finally:
        connections[name].close()
        del connections[name]
        del connections.settings[name]


class Cluster:
    """A server to do with as a test likes, with as many migrated databases as it wants."""

    _serial = itertools.count()

    def __init__(self, server: Server) -> None:
        self.server = server

    @contextmanager
    def database(self, *, is_empty: bool = False) -> Iterator[str]:
        """Yield the alias of a new database, which has no tables if ``is_empty``."""
        name = f"throwaway_{next(self._serial)}"
        self.execute(
            f"CREATE DATABASE {name} TEMPLATE {'template1' if is_empty else self._template}"
        )
        with self.alias(name):
            yield name
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def alias(self, name: str, **settings: Any) -> Iterator[str]:
        """Yield the alias ``name`` for the database of that name, or for what ``settings`` say."""
        given = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": name,
            "HOST": str(self.server.socket_dir),
            "PORT": str(PORT),
            "USER": USER,
        }
        with database_alias(name, **given | settings):
            yield name

    def execute(self, statement: str) -> None:
        """Run a statement that belongs to no database of ours, outside of a transaction."""
        with psycopg.connect(self.server.dsn, autocommit=True) as connection:
            connection.execute(statement)

    def run(self, program: str, *options: str, stdin: str = "") -> str:
        """Run one of PostgreSQL's client programs; return its output. Skips without it."""
        path = self.program(program)
        where = ["-h", str(self.server.socket_dir), "-p", str(PORT), "-U", USER]
        result = subprocess.run(
            [path, *where, *options], input=stdin, capture_output=True, text=True, check=True
        )
        return result.stdout

    def program(self, name: str) -> Path:
        path = self.server.installation.program(name)
        if path is None:
            pytest.skip(f"{name} is not part of this PostgreSQL")
        return path

    def burn_xids(self, count: int) -> None:
        """Use up transaction ids, as other databases of the cluster would."""
        self.execute(
            f"DO $$ BEGIN FOR i IN 1..{count} LOOP"
            " PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
        )

    def next_xid(self) -> int:
        """Return the transaction id that is given out next."""
        with psycopg.connect(self.server.dsn) as connection:
            row = connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())").fetchone()
            assert row is not None
            return int(row[0])

    @contextmanager
    def standby(self) -> "Iterator[Cluster]":
        """Yield a hot standby of this cluster."""
        primary = self.server
        folder = primary.folder.with_name(f"{primary.folder.name}-standby")
        folder.mkdir(mode=0o700)
        primary.account.own(folder)
        try:
            target = ["-D", str(folder / "data"), "-R", "-c", "fast", "--no-sync"]
            pg_basebackup = self.program("pg_basebackup")
            answer = primary.account.run(pg_basebackup, "-d", primary.dsn, *target)
            assert answer.status == 0, answer.said
            server = Server(folder, primary.installation, primary.account, durable=False)
            with server:
                sockets = server.socket_dir
                yield Cluster(server)
            shutil.rmtree(sockets)
        finally:
            shutil.rmtree(folder)

    @functools.cached_property
    def _template(self) -> str:
        self.execute(f"CREATE DATABASE {MIGRATED}")
        with self.alias(MIGRATED):
            call_command("migrate", "kanthorq_django", database=MIGRATED, verbosity=0)
        return MIGRATED
