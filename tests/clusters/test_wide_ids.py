"""Transaction ids of a cluster that has used up more than 32 bits, and ids of rows that large."""

from collections.abc import Iterator

import pytest
from django.db import connections

from kanthorq_django.models import Consumer, Task
from kanthorq_django.models.maintenance.rebase import rebase
from kanthorq_django.models.registration import Registration
from project.postgres.launcher import scratch_server
from tests.clusters.throwaway import Cluster
from tests.clusters.world import world_in_full_swing
from tests.races.race import CLEAN, UNIQUE_GUARD, Race, altered

EPOCH = 3  # how often the lower 32 bits have wrapped around


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with scratch_server() as server:
        cluster = Cluster(server)
        program = cluster.program("pg_resetwal")
        server.stop()
        answer = server.account.run(program, "--epoch", str(EPOCH), "-D", server.data)
        assert answer.status == 0, answer.said
        server.start()
        assert cluster.next_xid() > EPOCH << 32
        yield cluster


@pytest.fixture
def database(database: str) -> str:
    with connections[database].cursor() as cursor:
        for model in ("stream", "consumer", "task"):
            sequence = f"pg_get_serial_sequence('kanthorq_django_{model}', 'id')"
            cursor.execute(f"SELECT setval({sequence}, {1 << 33})")
    return database


def test_a_race_ends_as_it_does_with_small_ids(database: str, monkeypatch: pytest.MonkeyPatch):
    registration = Registration("race", includes=[">"])
    race = Race(Consumer.objects.using(database).register("racer", registration), seed=0)

    with altered(monkeypatch, "pull", (UNIQUE_GUARD, "")):
        race.run()

    assert race.errors == []
    assert race.verdict == CLEAN
    tasks = Task.objects.using(database)
    assert not tasks.filter(pk__lt=1 << 33).exists()
    first = tasks.select_related("event").earliest("pk")
    assert first.event.xid is not None
    assert first.event.xid > EPOCH << 32


def test_a_rebase_knows_its_own_wide_transaction_ids(database: str):
    world = world_in_full_swing(database)
    Consumer.objects.using(database).update(cluster_id=1)
    world.owe(world.publish_many_kinds())

    rebase(database)

    world.check()


def test_a_rebase_tells_wide_from_narrow_ones(
    database: str, cluster: Cluster, other_cluster: Cluster
):
    old = world_in_full_swing(database)
    dump = cluster.run("pg_dump", "--dbname", database, "--no-owner")
    with other_cluster.database(is_empty=True) as into:
        other_cluster.run("psql", "--dbname", into, "--quiet", stdin=dump)
        new = type(old)(into, dict(old.owed))
        new.owe(new.publish_many_kinds())

        rebase(into)

        new.check()
        new.handle_all()
        new.check()
