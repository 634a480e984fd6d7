"""Time limits of connections, and waits between tries."""

import logging
import sqlite3
import threading
from typing import Any

import pytest
from django.db import Error, OperationalError, connection, connections, transaction
from django.db.backends.sqlite3.base import DatabaseWrapper

from kanthorq_django.worker import upkeep
from kanthorq_django.worker.upkeep import Backoff, expect_dead_hosts, is_unavailable
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


def test_waits_double_up_to_the_longest_and_are_never_alike():
    backoff = Backoff("puller", first=1, longest=6)
    waits = [backoff.failed(OperationalError("away")) for _ in range(6)]

    for wait, most in zip(waits, (1, 2, 4, 6, 6, 6), strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits)) == 6
    backoff.succeeded()
    assert backoff.failed(OperationalError("away")) <= 1


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture):
    backoff = Backoff("puller")
    with caplog.at_level(logging.INFO):
        backoff.succeeded()
        for _ in range(5):
            backoff.failed(OperationalError("connection refused\n\tIs it running?"))
        backoff.succeeded()
        backoff.succeeded()

    assert [record.message for record in caplog.records] == [
        "puller interrupted, trying again: connection refused Is it running?",
        "puller works again",
    ]
    assert not caplog.records[0].exc_info


def test_a_defect_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture):
    Backoff("puller").failed(ZeroDivisionError())

    assert caplog.records[0].exc_info


def test_another_database_that_a_handler_leaves_in_a_transaction_is_closed(
    monkeypatch: pytest.MonkeyPatch,
):
    """Its driver does not tell what psycopg's does, and an error would end the handlers' thread."""
    given = {"lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": "lite"}, "default": {}}
    left = DatabaseWrapper(connections.configure_settings(given)["lite"], "lite")
    left.connection = sqlite3.connect(":memory:")
    left.autocommit = False
    connections["lite"] = left
    monkeypatch.setattr(upkeep._own, "connections", [left])
    upkeep.leave_connections()
    assert left.connection is None


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("code", "is_away"),
    [
        ("27000", False),  # a trigger's own
        ("2F002", False),  # a routine's own
        ("38000", False),
        ("39000", False),
        ("54000", False),  # a limit
        ("XX001", False),  # a damaged page
        ("53300", True),  # too many connections
        ("57P01", True),  # an administrator's shutdown
        ("23505", False),
    ],
)
def test_what_an_error_is_about_tells_whether_to_try_again(code: str, is_away: bool):
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$"
    with pytest.raises(Error) as caught, transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(raising)
    assert is_unavailable(caught.value) is is_away
