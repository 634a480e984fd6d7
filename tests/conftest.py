"""What every test gets."""

from collections.abc import Iterator

import pytest
from django.db import connection

from kanthorq_django.domain import subscriptions


@pytest.fixture(autouse=True)
def declared() -> Iterator[subscriptions.Registry]:
    """Forget what a test subscribes, and keep what the project declares."""
    registry = subscriptions.registry
    kept, duplicates = dict(registry._subscriptions), list(registry.duplicates)
    yield registry
    registry._subscriptions, registry.duplicates = kept, duplicates


@pytest.fixture
def fresh_statistics(db: None) -> None:
    """Let the server forget the dead rows that other tests left, which count as bad health."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute("SELECT pg_stat_reset()")
