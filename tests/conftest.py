"""What every test gets, or may ask for."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from django.db import connection, connections
from django.test import TransactionTestCase

from kanthorq_django.domain import subscriptions

# What migrations fill; tests add to it and change it inside transactions only.
FILLED = {"django_content_type", "auth_permission", "django_migrations"}


@pytest.fixture(autouse=True)
def declared() -> Iterator[subscriptions.Registry]:
    """Forget what a test subscribes, and keep what the project declares."""
    registry = subscriptions.registry
    kept, duplicates = dict(registry._subscriptions), list(registry.duplicates)
    yield registry
    registry._subscriptions, registry.duplicates = kept, duplicates


@pytest.fixture(
    params=[
        pytest.param(False, marks=pytest.mark.django_db),
        pytest.param(True, marks=pytest.mark.django_db(transaction=True)),
    ]
)
def is_committed(request: pytest.FixtureRequest) -> bool:
    """Run a test in a transaction that never commits, and once more in none."""
    assert connection.in_atomic_block is not request.param
    return bool(request.param)


@pytest.fixture
def fresh_statistics(db: None) -> None:
    """Let the server forget the dead rows that other tests left, which count as bad health."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute("SELECT pg_stat_reset()")


def _empty_tables(self: Any) -> None:
    """Truncate the tables that hold rows, as Django's flush does with all.

    A truncated table has a new file, and each of its indexes: for all of them a tenth of a second
    and more after each of some thousand tests, of which most leave rows in three or four.
    """
    for alias in self._databases_names(include_mirrors=False):
        with connections[alias].cursor() as cursor:
            tables = set(connections[alias].introspection.table_names(cursor)) - FILLED
            looks = [f"SELECT '{table}' WHERE EXISTS (SELECT FROM {table})" for table in tables]  # noqa: S608
            cursor.execute(" UNION ALL ".join(looks))
            if filled := ", ".join(table for (table,) in cursor.fetchall()):
                cursor.execute(f"TRUNCATE {filled} CASCADE")


TransactionTestCase._fixture_teardown = _empty_tables  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any], dict[str, Any]]:
    """Let what a hostile test has logged pass from a process that runs tests to the first one."""
    report = yield
    report["sections"] = [
        (name, text.encode(errors="backslashreplace").decode())
        for name, text in report.get("sections", ())
    ]
    return report
