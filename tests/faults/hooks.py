"""Faults inside a process: it dies or freezes at a named point, or runs with altered SQL.

Nothing of this is in the package: functions are wrapped when a process starts, and only if its
environment asks for it.

``FAULTS_POINT``  name:nth:signal, e.g. ``pull asked:2:KILL``
``FAULTS_SQL``    {"ack": [["old", "new"]]}
``FAULTS_SET``    {"kanthorq_django.worker.warden.CUT_AFTER": 1.0}
``FAULTS_OUTPUT`` the file that its output goes to, such as /dev/full
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.backends.utils import CursorWrapper

from kanthorq_django import sql

BUSINESS_WRITE = 'INSERT INTO "ledger_entry"'


class Point(NamedTuple):
    """A moment: before or after a statement, or the commit of a transaction that ran it."""

    statement: str  # the name of an .sql file, or how a statement begins
    moment: str  # before, after, before commit, after commit
    in_transaction: bool | None = None  # None: either

    def is_met(self, connection: BaseDatabaseWrapper, text: str, moment: str) -> bool:
        return (
            moment == self.moment
            and self.in_transaction in (None, connection.in_atomic_block)
            and (text in _texts(self.statement) or text.startswith(self.statement))
        )


POINTS = {
    "pull asked": Point("pull", "before"),  # it locks, reads, moves the cursor and commits at once
    "pull committed": Point("pull", "after commit"),
    "claim asked": Point("claim", "before"),
    "claim written": Point("claim", "after"),
    "turn given": Point("turns", "after"),
    "business written": Point(BUSINESS_WRITE, "after", in_transaction=True),
    "ack inside": Point("ack", "after", in_transaction=True),
    "handler committed": Point("ack", "after commit"),
    "ack asked": Point("ack", "before", in_transaction=False),
    "ack written": Point("ack", "after", in_transaction=False),
    "nack asked": Point("nack", "before"),
    "nack written": Point("nack", "after"),
    "renewal asked": Point("renew", "before"),
    "renewal written": Point("renew", "after"),
    "publication written": Point("publish", "before commit"),
    "publication committed": Point("publish", "after commit"),
    "occurrences published": Point('UPDATE "kanthorq_django_schedule"', "after"),
}


def arm() -> None:
    """Do what the environment asks for; nothing, usually."""
    for path, value in json.loads(os.environ.get("FAULTS_SET", "{}")).items():
        module, _, name = path.rpartition(".")
        owner = importlib.import_module(module)
        if not hasattr(owner, name):
            raise ValueError(f"{module} has no {name} any more")
        setattr(owner, name, value)
    if changes := json.loads(os.environ.get("FAULTS_SQL", "{}")):
        _alter(changes)
    if output := os.environ.get("FAULTS_OUTPUT"):
        file = os.open(output, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if asked := os.environ.get("FAULTS_POINT"):
        name, nth, action = asked.split(":")
        _Watch(POINTS[name], int(nth), signal.Signals[f"SIG{action}"])


class _Watch:
    """Sends ``action`` to this process when it passes ``point`` for the ``nth`` time."""

    def __init__(self, point: Point, nth: int, action: signal.Signals) -> None:
        self._point, self._nth, self._action = point, nth, action
        self._passes = itertools.count(1)
        self._ran: dict[int, list[str]] = {}  # what each connection's transaction has run
        self._inside = threading.local()  # our own statements, which Django's cursors may run
        # Found when it is needed: an older release, which is never watched, has none.
        watch, run = self, sql.run  # type: ignore[attr-defined]  # under the name by which it is called
        django_commit, django_execute = BaseDatabaseWrapper.commit, CursorWrapper.execute

        def commit(connection: BaseDatabaseWrapper) -> None:
            watch.commit(connection, lambda: django_commit(connection))

        def execute(cursor: CursorWrapper, text: str, params: Any = None) -> Any:
            return watch.run(cursor.db, [text], lambda: django_execute(cursor, text, params))

        def run_ours(
            connection: BaseDatabaseWrapper, statements: Any, params: Any, **how: Any
        ) -> Any:
            texts = [statement.text for statement in statements]
            return watch.run(connection, texts, lambda: run(connection, statements, params, **how))

        BaseDatabaseWrapper.commit = commit  # type: ignore[assignment,method-assign]  # as any patch
        CursorWrapper.execute = execute  # type: ignore[method-assign,assignment]
        sql.run = run_ours  # type: ignore[attr-defined]  # as above
        connection_created.connect(self.connected, weak=False)

    def connected(self, connection: BaseDatabaseWrapper, **_: object) -> None:
        self._ran.pop(id(connection), None)

    def run(self, connection: BaseDatabaseWrapper, texts: list[str], run: Callable[[], Any]) -> Any:
        """Run statements that travel together; some may be committed at once."""
        if getattr(self._inside, "is_running", False):
            return run()
        self._inside.is_running = True
        try:
            return self._run(connection, texts, run)
        finally:
            self._inside.is_running = False

    def _run(
        self, connection: BaseDatabaseWrapper, texts: list[str], run: Callable[[], Any]
    ) -> Any:
        for text in texts:
            self._pass(connection, text, "before")
        ran = self._ran.setdefault(id(connection), [])
        if sql.COMMIT.text in texts:
            ran += texts
            return self.commit(connection, run)
        result = run()
        for text in texts:
            self._pass(connection, text, "after")
        ran += texts
        return result

    def commit(self, connection: BaseDatabaseWrapper, run: Callable[[], Any]) -> Any:
        texts = self._ran.pop(id(connection), [])
        for text in texts:
            self._pass(connection, text, "before commit")
        result = run()
        for text in texts:
            self._pass(connection, text, "after commit")
        return result

    def _pass(self, connection: BaseDatabaseWrapper, text: str, moment: str) -> None:
        if self._point.is_met(connection, text, moment) and next(self._passes) == self._nth:
            os.kill(os.getpid(), self._action)


def _alter(changes: dict[str, list[list[str]]]) -> None:
    load: Callable[..., str] = sql.load

    @functools.cache
    def altered(name: str, **options: bool) -> str:
        text = load(name, **options)
        for old, new in changes.get(name, ()):
            if old not in text:
                raise ValueError(f"{name}.sql no longer says {old!r}")
            text = text.replace(old, new)
        return text

    for name in changes:
        altered(name)  # a test that alters nothing would prove nothing
    sql.load = altered


@functools.cache
def _texts(name: str) -> tuple[str, ...]:
    """Return the text of a statement and of its twins: for one row, last, skipping locked ones."""
    texts = set()
    options: dict[str, bool]
    for twin, options in itertools.product(
        (name, f"{name}_one", f"{name}_last"), ({}, {"skip_locked": True})
    ):
        with contextlib.suppress(KeyError, ValueError):  # there is no such twin
            texts.add(sql.load(twin, **options))
    return tuple(texts)
