"""The server that all contestants share, and a fresh copy of a prepared database for each run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from project.postgres.launcher import project_server

PREFIX = "kanthorq_bench"
REPORTED = ("server_version", "fsync", "synchronous_commit", "shared_buffers")


@dataclass
class Cluster:
    """A running PostgreSQL server, with the databases that this process made in it."""

    dsn: str
    _made: dict[str, None] = field(default_factory=dict)  # in order; sets have none

    def url(self, name: str) -> str:
        """Return the URL of a database, in the form that psycopg, asyncpg and others read."""
        given = conninfo_to_dict(self.dsn)
        user = quote(str(given.get("user", "")), safe="")
        if password := given.get("password"):
            user += ":" + quote(str(password), safe="")
        query = {key: str(given[key]) for key in ("host", "port") if given.get(key)}
        return f"postgresql://{user}@/{name}?{urlencode(query)}"

    def settings(self) -> dict[str, str]:
        """Return what of the server's settings decides its speed."""
        with psycopg.connect(self.dsn) as connection:
            rows = [connection.execute(f"SHOW {name}").fetchone() for name in REPORTED]
        return {name: str(row[0]) for name, row in zip(REPORTED, rows, strict=True) if row}

    def create(self, name: str, template: str | None = None) -> str:
        """Create a database, a copy of ``template`` if that is given; return its full name."""
        full_name = f"{PREFIX}_{os.getpid()}_{name}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
            sql.Identifier(full_name), sql.Identifier(template or "template0")
        )
        self._execute(statement)
        self._made[full_name] = None
        return full_name

    def drop(self, full_name: str) -> None:
        """Drop a database, with whoever is still connected to it."""
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        self._execute(drop.format(sql.Identifier(full_name)))
        self._made.pop(full_name, None)

    def settle(self, full_name: str) -> None:
        """Give the planner its statistics, and write to disk what a checkpoint later would."""
        with psycopg.connect(self.url(full_name), autocommit=True) as connection:
            connection.execute("ANALYZE")
            connection.execute("CHECKPOINT")

    def drop_all(self) -> None:
        """Drop all that this process made, and what others left that are dead."""
        for name in [*self._made, *self._left_over()]:
            self.drop(name)

    def _left_over(self) -> list[str]:
        with psycopg.connect(self.dsn) as connection:
            query = "SELECT datname FROM pg_database WHERE datname LIKE %s"
            names = [name for (name,) in connection.execute(query, [f"{PREFIX}%"])]
        return [name for name in names if not _is_alive(int(name.split("_")[2]))]

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(statement)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Yield the server of DATABASE_URL, or one of our own that writes every commit to disk."""
    if given := os.environ.get("DATABASE_URL"):
        found = Cluster(given)
    else:
        server = project_server(Path(__file__).parent, durable=True)
        server.start()
        found = Cluster(server.dsn)
    try:
        found.drop_all()
        yield found
    finally:
        with suppress(psycopg.OperationalError):
            found.drop_all()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
