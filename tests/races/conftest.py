from collections.abc import Callable, Iterator

import pytest
from django.db import connection
from django.db.backends.postgresql.psycopg_any import IsolationLevel
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


@pytest.fixture
def stricter_default(transactional_db: None) -> Iterator[Callable[[str, str], None]]:
    """Return a function that sets the isolation level of connections, by settings or server."""
    options = connection.settings_dict["OPTIONS"]
    kept = dict(options)

    def set_default(set_by: str, level: str) -> None:
        if set_by == "settings":
            options["isolation_level"] = IsolationLevel[level.upper().replace(" ", "_")]
        else:
            escaped = level.replace(" ", r"\ ")
            options["options"] = f"-c default_transaction_isolation={escaped}"
        connection.close()

    yield set_default
    options.clear()
    options.update(kept)
    connection.close()
