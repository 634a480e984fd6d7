import re
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError
from django.db import Error, OperationalError, connection, connections

from kanthorq_django import publish, signals
from kanthorq_django.domain.names import near_names
from kanthorq_django.management.lookup import find_consumers
from kanthorq_django.management.refusals import explain, one_sentence
from kanthorq_django.models import Event
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, StreamFactory
from tests.receivers import heard_by


def refused(statement: str) -> str:
    """Return how the database's refusal of ``statement`` is told."""
    with pytest.raises(Error) as caught, connection.cursor() as cursor:
        cursor.execute(statement)
    return explain(caught.value, "default")


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("SELECT FROM nowhere", "lacks KanthorQ's current tables; run: manage.py migrate"),
        ("SELECT nothing", "lacks KanthorQ's current tables; run: manage.py migrate"),
        ("SELECT 1 / 0", "The database 'default' refused: division by zero"),
        (
            "INSERT INTO kanthorq_django_stream DEFAULT VALUES",
            "Other rows .* forbid it: null value",
        ),
    ],
)
def test_what_the_database_refuses_is_told_in_one_line(statement: str, told: str):
    text = refused(statement)

    assert re.search(told, text)
    assert "\n" not in text


@pytest.mark.django_db(transaction=True)
def test_a_read_only_database_asks_for_the_primary():
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
    try:
        with pytest.raises(CommandError, match="read-only, as a standby is; use the primary"):
            kanthorq("publish", "order.paid")
    finally:
        connection.close()


def test_a_failed_connection_is_told_as_such():
    text = explain(OperationalError("connection failed:\n  refused\n"), "default")

    assert text == "The database 'default' cannot be reached: connection failed: refused"


def test_an_improper_configuration_is_told_without_a_traceback():
    with pytest.raises(CommandError, match="set DATABASE_URL"), one_sentence("default"):
        raise ImproperlyConfigured("set DATABASE_URL")


def test_a_defect_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError), one_sentence("default"):
        raise ZeroDivisionError


def test_another_database_than_postgresql_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(connections["default"]), "vendor", "sqlite")

    with pytest.raises(CommandError, match="is not PostgreSQL"):
        kanthorq("stats")


@pytest.mark.django_db(transaction=True)
def test_an_interrupted_prune_keeps_what_is_done_and_exits_with_130():
    stream = StreamFactory.create(name="audit")
    EventFactory.create_batch(3, stream=stream)

    def press_ctrl_c(**_: Any) -> None:
        raise KeyboardInterrupt

    with heard_by(press_ctrl_c, signals.pruned):
        ran = kanthorq("prune", "--older-than", "0s", "--stream", "audit", "--batch", 2, "--yes")

    assert (ran.status, ran.out) == (130, "")
    assert Event.objects.count() == 1


@pytest.mark.django_db(databases=["default", "other"])
def test_another_database_is_worked_on_by_its_alias():
    publish("order.paid", stream="elsewhere", using="other")

    assert [
        stream["name"]
        for stream in kanthorq("stats", "--json", "--database", "other").json["streams"]
    ] == ["elsewhere"]
    assert kanthorq("stats", "--json").json["streams"] == []


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ([], "there is none yet."),
        (["refunds", "shipping"], "did you mean 'refunds'?"),
        (["shipping", "audit"], "known: 'audit', 'shipping'."),
        ([f"audit-{number:02}" for number in range(11)], "known: 'audit-00', .*'audit-09', …"),
    ],
)
def test_a_name_gets_near_ones_or_the_known_ones(known: list[str], told: str):
    assert re.fullmatch(told.replace("?", r"\?"), near_names("refnds", known))


@pytest.mark.django_db
def test_rows_come_in_the_order_of_their_names_once_each():
    first, second = (ConsumerFactory.create(name=name) for name in ("b", "a"))

    assert find_consumers(["b", "a", "b"], "default") == [first, second]
