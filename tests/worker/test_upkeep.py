"""Time limits of connections, and what a handler leaves behind on them."""

import sqlite3
import threading
from typing import Any

import pytest
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.backends.sqlite3.base import DatabaseWrapper

from kanthorq_django.worker.connections import own_connections, upkeep
from kanthorq_django.worker.connections.upkeep import expect_dead_hosts
from tests.worker.working import default_database


def limits_of(alias: str) -> dict[str, Any]:
    """Return what a connection that is made from now on would be given."""
    made: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: made.append(dict(connections[alias].settings_dict["OPTIONS"]))
    )
    thread.start()
    thread.join()
    return made[0]


def test_connections_get_time_limits_where_the_project_has_none():
    with default_database(OPTIONS={"connect_timeout": 3, "application_name": "shop"}):
        elsewhere = threading.Thread(target=expect_dead_hosts)
        elsewhere.start()
        elsewhere.join()

        assert limits_of("default") == {
            "connect_timeout": 3,
            "application_name": "shop",
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }


LITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": "lite"}


def test_other_databases_get_none_of_those_limits(monkeypatch: pytest.MonkeyPatch):
    """Their drivers would refuse them, and with them each connection."""
    given = connections.configure_settings({"lite": LITE, "default": {}})
    monkeypatch.setitem(connections.settings, "lite", given["lite"])
    expecting = threading.Thread(target=expect_dead_hosts)
    expecting.start()
    expecting.join()

    assert limits_of("default").keys() >= upkeep.CONNECTION_OPTIONS.keys()
    assert limits_of("lite") == {}


def lite() -> DatabaseWrapper:
    """Return a connection to a database that is not PostgreSQL."""
    given = {"lite": LITE, "default": {}}
    made = DatabaseWrapper(connections.configure_settings(given)["lite"], "lite")
    made.connection = sqlite3.connect(":memory:")
    return made


def test_a_new_connection_to_another_database_is_passed_over():
    """To keep notes on it, as on those to PostgreSQL, would fail, and with it who connects."""
    made = lite()
    connection_created.send(DatabaseWrapper, connection=made)
    made.connection.close()


def test_another_database_that_a_handler_leaves_in_a_transaction_is_closed(
    monkeypatch: pytest.MonkeyPatch,
):
    """Its driver does not tell what psycopg's does, and an error would end the handlers' thread."""
    left = lite()
    left.autocommit = False
    connections["lite"] = left
    monkeypatch.setattr(own_connections._own, "connections", [left])
    upkeep.leave_connections()
    assert left.connection is None
