"""Whoever has another lease than the last one of a task can do nothing with it."""

from collections.abc import Callable, Iterator

import pytest
from django.db import DataError, connection, transaction
from django.db.models.functions import Now

from kanthorq_django.domain.states import LEASED
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.lease import Lease
from tests.factories import TaskFactory
from tests.ledger.models import Entry
from tests.models.leases import OTHERS, VERBS, cancelling, fields, of_another_moment, running

pytestmark = pytest.mark.django_db

NOT_LEASED = sorted(set(TaskState) - LEASED)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", [running, cancelling])
@pytest.mark.parametrize("other", [-1, 1])
def test_nothing_is_done_with_another_epoch(
    verb: Callable[[Lease], object], make: Callable[..., Task], other: int
):
    task = make()
    before = fields(task)
    assert verb(task.lease._replace(epoch=task.lease_epoch + other)) == set()
    assert fields(task) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", [running, cancelling])
def test_nothing_is_done_with_the_same_epoch_of_another_moment(
    verb: Callable[[Lease], object], make: Callable[..., Task]
):
    task = make(attempted_at=Now())
    before = fields(task)
    assert verb(of_another_moment(task.lease)) == set()
    assert fields(task) == before
    assert verb(task.lease) != set()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", NOT_LEASED)
def test_nothing_is_done_with_a_task_that_is_not_leased(
    verb: Callable[[Lease], object], state: TaskState
):
    task = TaskFactory.create(state=state, lease_epoch=1)
    before = fields(task)
    assert verb(task.lease) == set()
    assert fields(task) == before


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_done_with_a_task_that_is_gone(verb: Callable[[Lease], object]):
    assert verb(Lease(1, 1, None)) == set()


def test_of_many_only_ours_are_acked():
    first, second, third = running(), running(), running()
    results = {first.lease: "1", second.lease._replace(epoch=9): "2", third.lease: None}
    assert lease.ack(results, "default") == {first.pk, third.pk}
    states = Task.objects.order_by("pk").values_list("state", "result")
    assert list(states) == [
        (TaskState.COMPLETED, 1),
        (TaskState.RUNNING, None),
        (TaskState.COMPLETED, None),
    ]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("make", [running, cancelling])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_committed_along_with_another_lease(
    make: Callable[..., Task], other: Callable[[Lease], Lease], count: int
):
    tasks = [make(attempted_at=Now()) for _ in range(count)]
    before = [fields(task) for task in tasks]
    lost, *ours = (task.lease for task in tasks)
    with transaction.atomic():
        assert not lease.ack_and_commit(dict.fromkeys([other(lost), *ours]), "default")
        transaction.set_rollback(True)
    assert [fields(task) for task in tasks] == before
    with transaction.atomic():
        assert lease.ack_and_commit(dict.fromkeys([lost, *ours]), "default")
    ended = TaskState.COMPLETED if make is running else TaskState.CANCELLED
    assert {fields(task)["state"] for task in tasks} == {ended}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("state", NOT_LEASED)
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_committed_along_with_a_task_that_is_not_leased(state: TaskState, count: int):
    task = TaskFactory.create(state=state, lease_epoch=1)
    ours = [running() for _ in range(count - 1)]
    before = [fields(each) for each in (task, *ours)]
    with transaction.atomic():
        held = dict.fromkeys(each.lease for each in (task, *ours))
        assert not lease.ack_and_commit(held, "default")
        transaction.set_rollback(True)
    assert [fields(each) for each in (task, *ours)] == before


@pytest.fixture
def refusing() -> Iterator[None]:
    """A check of the project's own, at the commit, that fails as our statements do."""
    table = Entry._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " PERFORM 'no number'::integer; RETURN NULL; END $$;"
            f" CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON {table}"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP FUNCTION refuse() CASCADE")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("count", [1, 2])
def test_what_the_project_refuses_at_the_commit_is_no_lost_lease(refusing: None, count: int):
    tasks = [running() for _ in range(count)]
    with transaction.atomic():
        Entry.objects.create(event_id=tasks[0].event_id)
        with pytest.raises(DataError, match="no number"):
            lease.ack_and_commit(dict.fromkeys(task.lease for task in tasks), "default")
        transaction.set_rollback(True)
    assert {fields(task)["state"] for task in tasks} == {TaskState.RUNNING}


def test_the_last_states_are_told_of_the_last_leases_alone():
    ours, ended = running(attempted_at=Now()), TaskFactory.create(state=TaskState.COMPLETED)
    others = [other(ours.lease) for other in OTHERS]
    states = {ours.lease: TaskState.RUNNING, ended.lease: TaskState.COMPLETED}
    assert lease.last_states([*others, *states], "default") == states
    assert lease.last_states(others, "default") == {}
    assert lease.last_states([ours.lease], "default") == {ours.lease: TaskState.RUNNING}
    assert [lease.last_states([other], "default") for other in others] == [{}, {}]


def test_only_running_tasks_with_these_leases_are_asked_to_cancel():
    asked = running(attempted_at=Now(), cancel_requested_at=Now())
    others = [other(asked.lease) for other in OTHERS]
    unasked, undone = running(), cancelling(cancel_requested_at=Now())
    held = [asked.lease, unasked.lease, undone.lease]
    assert lease.asked_to_cancel(held, "default") == [asked.lease]
    assert lease.asked_to_cancel(others, "default") == []


def test_no_lease_at_all_is_nothing_to_do():
    assert lease.ack({}, "default") == set()
    assert lease.hand_back([], "default") == set()
    assert lease.renew({}, "default") == {}
