"""A worker in this process, in a thread of its own, and what tests do around it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from django.db import connection, connections

from kanthorq_django import publish_many, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Task
from kanthorq_django.worker.loop import WorkerLoop
from kanthorq_django.worker.options import WorkerOptions
from tests.concurrency import wait_until

PATIENCE = 20.0  # seconds in which whatever is waited for has to happen

# How their last statements tell a worker's connections apart; looks and pulls are transactions.
LOOK, RENEWAL, ACK = "COMMIT;", "Extend the leases in flight", "End leased tasks well"


@contextmanager
def working(*consumers: str, **options: Any) -> Iterator[WorkerLoop]:
    """Run a worker for ``consumers`` while the block runs; what it raised is raised at the end."""
    given: dict[str, Any] = {
        "poll_interval": timedelta(milliseconds=50),
        "shutdown_timeout": timedelta(seconds=PATIENCE),
        "listen": False,
    }
    loop = WorkerLoop(WorkerOptions(consumers=consumers, **given | options))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(_run, loop)
        try:
            yield loop
        finally:
            loop.stop()
            run.result(2 * PATIENCE)


def work_off(*consumers: str, **options: Any) -> int:
    """Run a worker until nothing is due; return how many handlers it started."""
    with ThreadPoolExecutor(1) as pool:
        loop = WorkerLoop(WorkerOptions(consumers=consumers, burst=True, **options))
        return pool.submit(_run, loop).result(2 * PATIENCE)


def accept(consumer: str, **options: Any) -> None:
    """Let ``consumer`` take every event of the work stream, and do nothing with it."""

    @subscribe("work.>", stream="work", consumer=consumer, **options)
    def ignore(message: Message) -> None:
        pass


@contextmanager
def default_database(**place: Any) -> Iterator[None]:
    """Let threads that begin within the block find the default database somewhere else."""
    direct = connections.settings["default"]
    connections.settings["default"] = {
        **direct,
        "ENGINE": "django.db.backends.postgresql",
        "OPTIONS": {},
        **place,
    }
    try:
        yield
    finally:
        connections.settings["default"] = direct


def announce(count: int = 1, subject: str = "work.due", stream: str = "work") -> list[Event]:
    """Publish ``count`` events whose bodies are their numbers."""
    return publish_many([Event(subject=subject, body=n) for n in range(count)], stream=stream)


@contextmanager
def altered(statement: str, undo: str) -> Iterator[None]:
    """Let the database be another one while the block runs."""
    with connection.cursor() as cursor:
        cursor.execute(statement)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(undo)


def forbidden(condition: str, table: str = "task") -> AbstractContextManager[None]:
    """Let PostgreSQL refuse rows of ``table`` that meet ``condition`` while the block runs."""
    alter = f"ALTER TABLE kanthorq_django_{table}"
    return altered(
        f"{alter} ADD CONSTRAINT guard CHECK (NOT ({condition}))", f"{alter} DROP CONSTRAINT guard"
    )


def indexed(expression: str) -> AbstractContextManager[None]:
    """Let tasks have an index of the project's own while the block runs."""
    return altered(
        f"CREATE INDEX kanthorq_own ON kanthorq_django_task ({expression})",
        "DROP INDEX kanthorq_own",
    )


def has_state(state: int, count: int, **given: Any) -> bool:
    return Task.objects.filter(state=state, **given).count() == count


def wait_for_state(state: int, count: int = 1, **given: Any) -> None:
    """Wait until exactly ``count`` tasks are in ``state``."""
    wait_until(lambda: has_state(state, count, **given), PATIENCE)


def backends(query: str) -> list[int]:
    """Return the process ids of this database's connections whose last statement has ``query``."""
    return _column(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE %s AND pid <> pg_backend_pid()",
        f"%{query}%",
    )


def terminate(query: str) -> None:
    """End the connections whose last statement has ``query``; wait until there is one."""
    found: set[int] = set()

    def are_found() -> bool:
        found.update(backends(query))  # the next moment the last statement may be another
        return bool(found)

    wait_until(are_found, PATIENCE)
    for pid in found:
        _column("SELECT pg_terminate_backend(%s)", pid)
    wait_until(lambda: not found & set(backends("")), PATIENCE)


def _column(statement: str, *params: str | int) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)
        return [row[0] for row in cursor.fetchall()]


def _run(loop: WorkerLoop) -> int:
    try:
        return loop.run()
    finally:
        connections.close_all()
