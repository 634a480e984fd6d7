from collections.abc import Iterator
from uuid import UUID

import pytest
from django.db import connections

from kanthorq_django import publish
from kanthorq_django.exceptions import RebaseRefused, StandbyDatabase
from kanthorq_django.models import Consumer
from kanthorq_django.models.maintenance.rebase import rebase
from kanthorq_django.models.registration import Registration
from tests.clusters.throwaway import Cluster
from tests.concurrency import wait_until


@pytest.fixture
def unread(database: str) -> UUID:
    """The id of an event that the consumer ``reader`` has not read, after one that it has."""
    registration = Registration("s", includes=[">"])
    consumer = Consumer.objects.using(database).register("reader", registration)
    publish("a.b", stream="s", using=database)
    assert len(consumer.pull()) == 1
    return publish("a.c", stream="s", using=database).id


@pytest.fixture
def standby(cluster: Cluster, database: str, unread: UUID) -> Iterator[str]:
    """An alias of ``database`` on a standby that has replayed all of it."""
    written = value(database, "SELECT pg_current_wal_lsn()::text")
    with (
        cluster.standby() as standby,
        standby.alias(f"{database}_standby", NAME=database) as alias,
    ):
        replayed = f"SELECT pg_last_wal_replay_lsn() >= '{written}'"
        wait_until(lambda: value(alias, replayed) is True)
        yield alias


def value(using: str, statement: str) -> object:
    with connections[using].cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()[0]


def test_a_standby_refuses_whatever_writes_and_tells_its_lag_until_it_is_promoted(
    standby: str, unread: UUID
):
    consumer = Consumer.objects.using(standby).get(name="reader")

    with pytest.raises(StandbyDatabase, match=f"'{standby}' is a standby"):
        consumer.pull()
    with pytest.raises(StandbyDatabase):
        consumer.pull_page(10)
    with pytest.raises(RebaseRefused, match="is a standby"):
        rebase(standby)
    assert consumer.lag().count == 1

    value(standby, "SELECT pg_promote()")

    later = publish("a.d", stream="s", using=standby).id
    assert [task.event_id for task in consumer.pull()] == [unread, later]
    assert consumer.pull() == []
