"""What grows without a bound is told by ``kanthorq health`` and in the admin before it hurts."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.test import Client

from kanthorq_django.models import Event, Stream, Worker
from kanthorq_django.models.maintenance import health as health_module
from kanthorq_django.models.maintenance.health import GROWTH, Limits, examine
from tests.admin.pages import page, text_of
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_statistics")]


def run(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def failed(**limits: Any) -> dict[str, str]:
    findings = examine("default", Limits(workers=0, **limits))
    return {each.check: each.detail for each in findings if each.status != "ok"}


def unread(age: timedelta) -> str:
    """Let an event wait unread for ``age``; return the name of the consumer that it waits for."""
    consumer = ConsumerFactory.create()
    event = EventFactory.create(stream=consumer.stream)
    Event._base_manager.filter(pk=event.pk).update(created_at=Now() - age)
    name: str = consumer.name
    return name


def test_nothing_of_it_is_told_of_a_fresh_database(admin_client: Client):
    Worker.objects.create(host="here", pid=1, concurrency=1)
    assert GROWTH.isdisjoint(failed())
    assert b"kq-growth" not in admin_client.get(page("consumer_changelist")).content


def test_events_that_a_stale_consumer_pins_are_told():
    name = unread(timedelta(days=8))
    detail = f"prune has to keep events: unread events wait longer than 7 days: {name}"
    assert failed()["pinned"].startswith(detail)
    assert "pinned" not in failed(pinned=timedelta(days=9))
    ran = kanthorq("health", "--max-pinned", "9d", "--json")
    assert {check["name"]: check["status"] for check in ran.json["checks"]}["pinned"] == "ok"


def test_the_admin_tells_it_too(admin_client: Client):
    name = unread(timedelta(days=8))
    told = text_of(admin_client.get(page("consumer_changelist")))
    assert f"pinned prune has to keep events: unread events wait longer than 7 days: {name}" in (
        told
    )


def test_a_server_that_is_in_trouble_is_told_in_the_admin(admin_client: Client, monkeypatch):
    monkeypatch.setitem(health_module.CHECKS, "dead_rows", lambda patient: (False, "dead: <many>"))
    shown = admin_client.get(page("consumer_changelist")).content.decode()
    assert "<code>dead_rows</code> dead: &lt;many&gt;" in shown


class Grown:
    """The server's own facts, which a test cannot bring about."""

    prepared_gid, prepared_age = "gid\n1", timedelta(hours=2)
    dead_rows = '{"kanthorq_django_task": [60000, 40000], "kanthorq_django_event": [1, 100]}'


def test_dead_rows_and_prepared_transactions_are_told_by_name():
    patient: Any = type("Patient", (), {"growth": Grown, "limits": Limits()})
    is_ok, detail = health_module.CHECKS["dead_rows"](patient)
    assert (is_ok, detail) == (
        False,
        "dead rows: kanthorq_django_task 60,000 of 100,000; does autovacuum keep up?",
    )
    is_ok, detail = health_module.CHECKS["prepared"](patient)
    assert not is_ok
    assert detail.startswith(r"'gid\n1' is prepared for 2:00:00")


@pytest.mark.django_db(transaction=True)
def test_a_forgotten_prepared_transaction_is_named():
    with connection.cursor() as cursor:
        cursor.execute("SHOW max_prepared_transactions")
        if cursor.fetchone() == ("0",):
            pytest.skip("This server has max_prepared_transactions = 0, as PostgreSQL comes.")
    run("BEGIN; CREATE TABLE kq_probe (); PREPARE TRANSACTION 'kq-forgotten'")
    try:
        told = failed(transaction=timedelta(0))
    finally:
        run("ROLLBACK PREPARED 'kq-forgotten'")
    assert told["prepared"].startswith("'kq-forgotten' is prepared for 0:00:0")
    assert "transactions" in told


@pytest.fixture
def many_dead_rows(monkeypatch, transactional_db: None) -> Iterator[None]:
    monkeypatch.setattr(health_module, "DEAD_MIN", 10)
    run("ALTER TABLE kanthorq_django_stream SET (autovacuum_enabled = off)")
    Stream.objects.bulk_create(Stream(name=f"s-{number}") for number in range(100))
    Stream._base_manager.all().delete()
    run("SELECT pg_stat_force_next_flush()")
    yield
    run("ALTER TABLE kanthorq_django_stream RESET (autovacuum_enabled)")


@pytest.mark.django_db(transaction=True)
def test_dead_rows_are_counted(many_dead_rows: None):
    assert "kanthorq_django_stream" in failed()["dead_rows"]
    assert "dead_rows" not in failed(dead_rows=1.0)


def test_a_role_without_privileges_on_statistics_can_ask(db: None):
    run("CREATE ROLE kanthorq_growth_probe; SET LOCAL ROLE kanthorq_growth_probe")
    patient: Any = health_module._Patient("default", Limits())
    assert patient.growth.prepared_gid is None
    assert patient.growth.dead_rows == "{}"
