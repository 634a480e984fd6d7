import pytest
from django.core.management.base import CommandError
from django.db import connection

from kanthorq_django.models import Consumer, Task, Worker
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
