"""What a restore leaves behind, and what a rebase makes of it, with real dumps."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.db import connections, transaction
from django.db.models.functions import Now
from django.utils import timezone
from pytest_django import Settings

from kanthorq_django import publish
from kanthorq_django.exceptions import ForeignCluster, RebaseRefused
from kanthorq_django.models import Consumer, Event, Task, TaskState, Worker
from kanthorq_django.models.deletion import without_deliveries
from kanthorq_django.models.delivery.turns import Serialize
from kanthorq_django.models.maintenance import rebase as module
from kanthorq_django.models.maintenance.rebase import Rebased, rebase
from kanthorq_django.models.maintenance.reencryption import reencrypt
from tests.clusters.throwaway import Cluster, database_alias
from tests.clusters.world import STREAM, World, read_all, world_in_full_swing
from tests.concurrency import begin_elsewhere, elsewhere, wait_until
from tests.races.race import UNIQUE_GUARD, altered

FAR = 400  # transactions; more than any test uses


@pytest.fixture
def old(database: str) -> World:
    return world_in_full_swing(database)


Restore = Callable[[Cluster, str, Cluster, str], None]


def restore_all(source: Cluster, name: str, target: Cluster, into: str) -> None:
    """As most people do it: schema and data, a table per transaction."""
    dump = source.run("pg_dump", "--dbname", name, "--no-owner")
    target.run("psql", "--dbname", into, "--quiet", "-v", "ON_ERROR_STOP=1", stdin=dump)


def restore_rows(source: Cluster, name: str, target: Cluster, into: str) -> None:
    """Row by row into existing tables, a row per transaction, as a replication does."""
    options = ["--inserts", "--data-only", "--table", "kanthorq_django_*"]
    dump = source.run("pg_dump", "--dbname", name, *options)
    target.run("psql", "--dbname", into, "--quiet", "-v", "ON_ERROR_STOP=1", stdin=dump)


def put_ahead(ahead: Cluster, behind: Cluster) -> None:
    """Let one cluster have used many more transaction ids than the other."""
    missing = behind.next_xid() + FAR - ahead.next_xid()
    if missing > 0:
        ahead.burn_xids(missing)


def bring_cursors_up_to_date(world: World) -> None:
    """Most consumers read all there is; the others stay as they are."""
    event = world.publish()
    for name in ("all", "refunds", "new", "parked", "refiltered", "dated"):
        read_all(world.consumer(name))
    world.owe({event})


@pytest.fixture(params=["behind", "ahead", "overtaking"])
def counter(request: pytest.FixtureRequest) -> str:
    """How far the new cluster is with its transaction ids, against the old cursors."""
    return str(request.param)


@pytest.fixture(params=[restore_all, restore_rows])
def new(
    request: pytest.FixtureRequest,
    old: World,
    cluster: Cluster,
    other_cluster: Cluster,
    counter: str,
) -> Iterator[World]:
    """The old world, restored into a cluster that counts its transactions otherwise."""
    if counter == "ahead":
        put_ahead(other_cluster, cluster)
    else:
        put_ahead(cluster, other_cluster)
        bring_cursors_up_to_date(old)
    with other_cluster.database(is_empty=request.param is restore_all) as into:
        request.param(cluster, old.using, other_cluster, into)
        yield World(into, dict(old.owed))


@pytest.fixture
def one_line_of_defence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what is read twice fail loudly, instead of being ignored as known."""
    with (
        altered(monkeypatch, "pull", (UNIQUE_GUARD, "")),
        altered(monkeypatch, "rebase_consumer", (UNIQUE_GUARD, "")),
    ):
        yield


@pytest.mark.usefixtures("one_line_of_defence")
def test_after_a_restore_and_a_rebase_every_event_has_exactly_one_task(
    new: World, cluster: Cluster, other_cluster: Cluster, counter: str
):
    restored = new.event_ids()
    with pytest.raises(ForeignCluster, match="kanthorq rebase"):
        new.consumer("all").pull()
    new.owe(new.publish_many_kinds())
    new.register("native-all")
    new.register("native-new", deliver="new")
    new.owed["native-all"] = new.event_ids()
    new.owe(new.publish_many_kinds())
    if counter == "overtaking":
        put_ahead(other_cluster, cluster)
        new.owe(new.publish_many_kinds())

    rebased = rebase(new.using)

    assert {result.name for result in rebased} == new.owed.keys()
    new.check()
    assert rebase(new.using) == [Rebased(name, 0, 0) for name in sorted(new.owed)]
    new.owe(new.publish_many_kinds())
    other_cluster.burn_xids(2 * FAR)  # past all transaction ids that were restored
    new.handle_all()
    new.check()
    assert restored < new.event_ids()


def publish_and_prune(world: World) -> None:
    """Move all cursors on by an event of which nothing is left."""
    event = world.publish()
    for name in world.owed:
        read_all(world.consumer(name))
    Task.objects.using(world.using).filter(event=event).delete()
    Event.objects.using(world.using).filter(pk=event).delete()


def test_an_event_with_a_task_was_restored_even_if_its_numbers_look_native(
    cluster: Cluster, other_cluster: Cluster, database: str
):
    """Its old transaction id is below the restoring one's, as if a savepoint had written it."""
    old = World(database)
    old.register("waiting")
    old.register("refiltered", "nothing")
    kept = old.publish()
    read_all(old.consumer("waiting"))
    put_ahead(other_cluster, cluster)
    put_ahead(cluster, other_cluster)
    publish_and_prune(old)
    old.register("refiltered", ">")
    with other_cluster.database(is_empty=True) as into:
        restore_all(cluster, database, other_cluster, into)
        new = World(into)
        native = new.publish()

        rebase(into)

        new.owed = {"waiting": {kept, native}, "refiltered": {native}}
        new.check()


def test_where_the_count_of_transactions_went_on_cursors_are_right_as_they_are(old: World):
    """As after pg_upgrade, which keeps the rows and the count, but not the identifier."""
    Consumer.objects.using(old.using).update(cluster_id=1)
    old.owe(old.publish_many_kinds())

    rebase(old.using)

    old.check()
    assert rebase(old.using) == [Rebased(name, 0, 0) for name in sorted(old.owed)]
    old.handle_all()
    old.check()


def test_a_dry_run_counts_and_changes_nothing(old: World):
    Consumer.objects.using(old.using).update(cluster_id=1)
    before = contents(old.using)

    counted = rebase(old.using, dry_run=True)

    assert contents(old.using) == before
    assert rebase(old.using) == counted
    assert sum(result.task_count for result in counted) > 0


def contents(using: str) -> list[object]:
    return [
        list(model._base_manager.using(using).order_by("pk").values())
        for model in (Consumer, Event, Task)
    ]


def test_added_tasks_wait_as_a_pull_would_have_let_them(database: str):
    world = World(database)
    world.register("reader")
    world.register("parked", parked=True)
    due = timezone.now() + timedelta(hours=1)
    now = publish("order.paid", stream=STREAM, resource_key="order-1", using=database)
    later = publish("order.paid", stream=STREAM, schedule_at=due, using=database)

    rebase(database)

    tasks = Task.objects.using(database).values_list("event", "state", "attempt_count")
    assert set(tasks.filter(consumer__name="reader")) == {
        (now.id, TaskState.AVAILABLE, 0),
        (later.id, TaskState.AVAILABLE, 0),
    }
    assert set(tasks.filter(consumer__name="parked")) == {
        (now.id, TaskState.PENDING, 0),
        (later.id, TaskState.PENDING, 0),
    }
    assert set(tasks.filter(event=later).values_list("schedule_at")) == {(due,)}
    (task,) = world.consumer("reader").claim()
    assert (task.event, task.resource_key) == (now, "order-1")


def test_added_tasks_are_those_that_a_pull_would_have_made(database: str):
    world = World(database)
    world.register("reader", excludes=["*.tested"], serialize=Serialize.ON.value)
    world.publish("order.tested")
    keyed = publish("order.paid", stream=STREAM, resource_key="order-1", using=database)
    free = publish("order.paid", stream=STREAM, using=database)

    assert rebase(database) == [Rebased("reader", 2, 2)]

    tasks = Task.objects.using(database).values_list("event", "turn_key")
    assert set(tasks) == {(keyed.id, "order-1"), (free.id, None)}
    assert len(world.consumer("reader").claim()) == 2


def test_a_rebase_is_refused_while_a_worker_is_alive(database: str):
    worker = Worker.objects.using(database).create(host="shop-1", pid=7, concurrency=1)

    with pytest.raises(RebaseRefused, match="7@shop-1"):
        rebase(database)

    Worker.objects.using(database).filter(pk=worker.pk).update(seen_at=Now() - timedelta(minutes=5))
    assert rebase(database) == []


def test_a_rebase_is_refused_inside_a_transaction(database: str):
    with transaction.atomic(using=database), pytest.raises(RebaseRefused, match="one is open"):
        rebase(database)


def test_a_rebase_is_refused_while_a_publisher_stays_open(
    database: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kanthorq_django.models.maintenance.rebase.LOCK_TIMEOUT", "50ms")
    settings = connections[database].settings_dict
    with database_alias(f"{database}_open", **settings) as other, transaction.atomic(other):
        publish("order.paid", stream=STREAM, using=other)
        with pytest.raises(RebaseRefused, match="still open"):
            rebase(database)

    assert rebase(database) == []


def test_a_rebase_takes_its_time_whatever_the_limit_of_a_statement_is(
    cluster: Cluster, database: str
):
    World(database).register("reader")
    publish("order.paid", stream=STREAM, using=database)
    with connections[database].cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql"
            " AS $$ BEGIN PERFORM pg_sleep(1.1); RETURN NEW; END $$;"
            " CREATE TRIGGER dawdle BEFORE INSERT ON kanthorq_django_task"
            " FOR EACH ROW EXECUTE FUNCTION dawdle();"
        )
    options = {"options": "-c statement_timeout=1000"}
    with cluster.alias(f"{database}_limited", NAME=database, OPTIONS=options) as limited:
        assert rebase(limited) == [Rebased("reader", 1, 1)]


def test_a_stream_without_old_consumers_is_readable_after_a_rebase(database: str):
    publish("order.paid", stream=STREAM, using=database)
    with connections[database].cursor() as cursor:
        cursor.execute("UPDATE kanthorq_django_event SET xid = '77777777777'")
    world = World(database)
    consumer = world.register("reader")
    with pytest.raises(ForeignCluster):
        consumer.pull()

    assert rebase(database) == [Rebased("reader", 1, 1)]

    assert consumer.pull() == []
    assert len(consumer.claim()) == 1
    assert len(world.register("later").pull()) == 1


@pytest.mark.parametrize("is_followed", [False, True])
def test_what_a_trigger_publishes_for_an_added_task_is_read_afterwards(
    database: str, monkeypatch: pytest.MonkeyPatch, *, is_followed: bool
):
    world = World(database)
    consumer = world.register("reader")
    publish("order.paid", stream=STREAM, using=database)
    with connections[database].cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION echo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO kanthorq_django_event"
            " (id, stream_id, subject, body, metadata, resource_key)"
            " SELECT gen_random_uuid(), stream_id, 'order.echoed', '', '{}', ''"
            " FROM kanthorq_django_event WHERE id = NEW.event_id AND subject = 'order.paid';"
            " RETURN NEW; END $$;"
            " CREATE TRIGGER echo AFTER INSERT ON kanthorq_django_task"
            " FOR EACH ROW EXECUTE FUNCTION echo();"
        )
    if is_followed:  # by another transaction, which ends before the rebase does
        monkeypatch.setattr(module, "_add_tasks", _and_use_an_id(module._add_tasks, database))

    assert rebase(database) == [Rebased("reader", 1, 1)]

    (task,) = consumer.pull()
    assert task.event.subject == "order.echoed"


def _and_use_an_id(step: Callable[..., Rebased], using: str) -> Callable[..., Rebased]:
    def use() -> None:
        with connections[using].cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()")

    def run(*args: Any) -> Rebased:
        rebased = step(*args)
        elsewhere(use)
        return rebased

    return run


def test_after_bodies_were_encrypted_anew_cursors_are_right_as_they_are(
    database: str, settings: Settings
):
    """As after pg_upgrade; a rotation of keys makes no event look as if it had been restored."""
    world = World(database)
    world.register("reader")
    world.publish_many_kinds()
    read_all(world.consumer("reader"))
    unread = world.publish_many_kinds()
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    reencrypt(database)
    world.publish_many_kinds()
    world.register("new", deliver="new")
    world.owed = {"reader": world.event_ids(), "new": set()}

    rebase(database)
    Consumer.objects.using(database).update(cluster_id=1)
    rebase(database)

    assert unread < world.owed["reader"]
    world.check()


def test_a_rebase_and_a_deletion_of_events_wait_for_each_other_in_one_order(database: str):
    world = World(database)
    consumer = world.register("reader")
    world.publish()

    def is_waited_for() -> bool:
        with connections[database].cursor() as cursor:
            cursor.execute("SELECT pg_stat_clear_snapshot()")
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            return bool(cursor.fetchone()[0])

    with without_deliveries([consumer.stream_id], database):  # as a deletion begins
        other = begin_elsewhere(lambda: rebase(database))
        wait_until(is_waited_for)
        Event.objects.using(database).all().delete()

    assert other.result(30) == [Rebased("reader", 0, 0)]
