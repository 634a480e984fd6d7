"""Leased tasks, and what the holders of their leases do."""

from datetime import timedelta
from typing import Any

from kanthorq_django.domain.failures import Failure
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.lease import Lease
from tests.factories import TaskFactory

MINUTE = timedelta(minutes=1)
FAILURE = Failure("failed", "the stack")


def running(**options: Any) -> Task:
    return TaskFactory.create(state=TaskState.RUNNING, **options)


def cancelling(**options: Any) -> Task:
    """A cancellation in its first attempt."""
    options.setdefault("cancel_attempt_count", 1)
    return TaskFactory.create(state=TaskState.CANCELLING, lease_epoch=2, **options)


def fields(task: Task) -> dict[str, Any]:
    """Every column of the task as it is stored."""
    return dict(Task.objects.filter(pk=task.pk).values().get())


def ack(held: Lease) -> object:
    return lease.ack({held: '"done"'}, "default")


def ack_among_others(held: Lease) -> object:
    return lease.ack({held: '"done"'}, "default", skip_locked=True)


def nack(held: Lease, **options: Any) -> object:
    states = lease.nack({held: lease.Failed(FAILURE, **options)}, "default")
    return states.get(held.task_id, set())


def hand_back(held: Lease) -> object:
    return lease.hand_back([held], "default")


def renew(held: Lease) -> object:
    return {
        found.task_id
        for found, row in lease.renew({held: MINUTE}, "default").items()
        if row.is_renewed
    }


def earlier(held: Lease) -> Lease:
    return held._replace(epoch=held.epoch - 1)


def of_another_moment(held: Lease) -> Lease:
    """The same id and epoch, given before by a commit that a crash took back."""
    assert held.since is not None
    return held._replace(since=held.since - 1)


VERBS = (ack, ack_among_others, nack, hand_back, renew)
OTHERS = (earlier, of_another_moment)
