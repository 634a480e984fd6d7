from typing import Any

import pytest
from django.core.management.base import CommandError
from django.db import OperationalError, connection

from kanthorq_django import sql
from kanthorq_django.models import Consumer, Task, Worker
from kanthorq_django.models.maintenance import rebase
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory

# A rebase has a transaction of its own.
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def stranded() -> Consumer:
    """A consumer with two unread events, whose cursor another cluster wrote."""
    consumer = ConsumerFactory.create(name="refunds", cluster_id=17)
    EventFactory.create_batch(2, stream=consumer.stream)
    return consumer


def is_stranded(consumer: Consumer) -> bool:
    consumer.refresh_from_db()
    return consumer.cluster_id == 17


def test_each_consumer_is_told_with_what_it_got(stranded: Consumer):
    ran = kanthorq("rebase", "--yes")

    assert ran.words[1:] == [["refunds", "2", "2"]]
    assert not is_stranded(stranded)
    assert Task.objects.count() == 2


def test_it_works_where_the_server_binds_parameters(
    stranded: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "server_side_binding", True)
    connection.close()

    kanthorq("rebase", "--yes")

    connection.close()
    assert not is_stranded(stranded)


def test_a_dry_run_tells_the_same_and_changes_nothing(stranded: Consumer):
    ran = kanthorq("rebase", "--dry-run")

    assert ran.words[1:] == [["refunds", "2", "2"]]
    assert "nothing was changed" in ran.err
    assert is_stranded(stranded)
    assert not Task.objects.exists()


def test_only_who_is_kept_waiting_blames_an_open_transaction(
    stranded: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sql, "load", lambda _: "DO 'BEGIN RAISE query_canceled; END'")

    with pytest.raises(OperationalError):
        rebase.rebase("default")

    assert is_stranded(stranded)


def test_once_publishers_are_locked_out_it_waits_as_long_as_it_takes(
    stranded: Consumer, monkeypatch: pytest.MonkeyPatch
):
    limits: dict[str, str] = {}
    go_on = rebase._rebase

    def note_limits(using: str) -> Any:
        with connection.cursor() as cursor:
            for name in ("lock_timeout", "statement_timeout"):
                cursor.execute(f"SHOW {name}")
                limits[name] = cursor.fetchone()[0]
        return go_on(using)

    monkeypatch.setattr(rebase, "_rebase", note_limits)
    rebase.rebase("default")

    assert limits == {"lock_timeout": "0", "statement_timeout": "0"}
    assert not is_stranded(stranded)


def test_without_a_terminal_and_without_yes_it_refuses(stranded: Consumer):
    with pytest.raises(CommandError, match="add --yes, or --dry-run"):
        kanthorq("rebase")

    assert is_stranded(stranded)


@pytest.mark.parametrize("option", ["--yes", "--dry-run"])
def test_while_a_worker_is_alive_it_refuses(option: str, stranded: Consumer):
    Worker.objects.create(host="here", pid=1, concurrency=10)

    with pytest.raises(CommandError, match="Workers are alive: 1@here"):
        kanthorq("rebase", option)

    assert is_stranded(stranded)
