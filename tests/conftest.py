"""What every test gets."""

from collections.abc import Iterator

import pytest

from kanthorq_django.domain import subscriptions


@pytest.fixture(autouse=True)
def declared() -> Iterator[subscriptions.Registry]:
    """Forget what a test subscribes, and keep what the project declares."""
    registry = subscriptions.registry
    kept, duplicates = dict(registry._subscriptions), list(registry.duplicates)
    yield registry
    registry._subscriptions, registry.duplicates = kept, duplicates
