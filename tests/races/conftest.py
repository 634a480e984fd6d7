from collections.abc import Iterator

import pytest
from pytest_django import DjangoDbBlocker

from tests.clusters.throwaway import database_alias
from tests.races.race import UNIQUE_GUARD, altered


@pytest.fixture
def one_line_of_defence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let an event that is read twice fail loudly, instead of being ignored as known."""
    with altered(monkeypatch, "pull", (UNIQUE_GUARD, "")):
        yield


@pytest.fixture
def second(transactional_db: None, django_db_blocker: DjangoDbBlocker) -> Iterator[str]:
    """A second connection to the database, under an alias of its own."""
    # A test case refuses aliases that it does not know.
    with django_db_blocker.unblock(), database_alias("second") as alias:
        yield alias


@pytest.fixture
def third(second: str) -> Iterator[str]:
    with database_alias("third") as alias:
        yield alias
