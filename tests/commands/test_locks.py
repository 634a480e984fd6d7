"""``kanthorq health`` and ``stats`` behind a lock, as cron starts them again and again."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.core.management.base import CommandError
from django.db import connection, connections, transaction

from kanthorq_django.management.verbs import health, stats
from kanthorq_django.management.verbs.verb import LOCK_TIMEOUT
from kanthorq_django.models import Task
from kanthorq_django.models.isolation import waiting_at_most
from kanthorq_django.models.maintenance.health import CHECKS, LOCKED
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("undeclared")]

SOON = timedelta(milliseconds=50)


@pytest.fixture
def locked() -> Iterator[None]:
    """Let another session hold a lock on the tasks, as a migration does."""
    ConsumerFactory.create(name="refunds")
    other = connections.create_connection("default")
    try:
        other.set_autocommit(False)
        with other.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {Task._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        yield
    finally:
        other.close()


def lock_timeout() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SHOW lock_timeout")
        return str(cursor.fetchone()[0])


@pytest.mark.usefixtures("locked")
def test_health_behind_a_lock_tells_so_and_ends_with_1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "LOCK_TIMEOUT", SOON)

    ran = kanthorq("health", "--min-workers", 0, "--json")

    assert ran.status == 1
    failed = {c["name"]: c["detail"] for c in ran.json["checks"] if c["status"] == "failed"}
    assert failed == dict.fromkeys(["cluster", "stuck", "due", "declared", "orphans"], LOCKED)
    assert len(ran.json["checks"]) == len(CHECKS)
    assert lock_timeout() == "0"


@pytest.mark.usefixtures("locked")
def test_stats_behind_a_lock_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "LOCK_TIMEOUT", SOON)

    with pytest.raises(CommandError, match=r"^Another session holds a lock in .*'default' for"):
        kanthorq("stats")

    assert lock_timeout() == "0"


@pytest.mark.parametrize(("before", "within"), [("0", "10s"), ("1min", "10s"), ("3s", "3s")])
def test_a_project_that_waits_less_long_is_heeded(before: str, within: str):
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', %s, false)", [before])
    try:
        with waiting_at_most("default", LOCK_TIMEOUT):
            assert lock_timeout() == within
        assert lock_timeout() == before
    finally:
        connection.close()


@pytest.mark.parametrize("verb", ["health", "stats"])
@pytest.mark.parametrize("before", ["0", "1min", "3s"])
def test_a_transaction_of_the_caller_waits_as_long_as_before(verb: str, before: str):
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [before])
        kanthorq(verb)
        assert lock_timeout() == before
