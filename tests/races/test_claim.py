import threading
from collections.abc import Callable

import pytest
from django.db import connections
from django.db.models.functions import Now

from kanthorq_django import publish_many
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.registration import Registration
from tests.races.race import DEADLINE

pytestmark = pytest.mark.django_db(transaction=True)

TASK_COUNT = 400


@pytest.fixture
def consumer() -> Consumer:
    """A consumer with many tasks that are due."""
    consumer = Consumer.objects.register("reader", Registration("s", includes=[">"], parked=True))
    publish_many([Event(subject="a.b") for _ in range(TASK_COUNT)], stream="s")
    while not consumer.pull_page(1_000).is_idle:
        pass
    Task.objects.update(state=TaskState.AVAILABLE)
    return consumer


def claim_at_once(consumer: Consumer, limits: tuple[int, ...] = (1, 3, 7, 50)) -> list[Task]:
    """Let claimers with these limits lease all there is, each on a connection of its own."""
    claimed: list[Task] = []
    errors: list[BaseException] = []
    start = threading.Barrier(len(limits), timeout=DEADLINE)

    def claim(limit: int) -> None:
        try:
            start.wait()
            while tasks := consumer.claim(limit):
                claimed.extend(tasks)
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=claim, args=[limit]) for limit in limits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return claimed


def test_no_task_is_leased_to_two_claimers(consumer: Consumer):
    claimed = claim_at_once(consumer)

    assert len(claimed) == len({task.pk for task in claimed}) == TASK_COUNT
    assert {(task.attempt_count, task.lease_epoch) for task in claimed} == {(1, 1)}


def test_a_lease_that_ran_out_has_one_heir(consumer: Consumer):
    claim_at_once(consumer)
    Task.objects.update(schedule_at=Now())

    claimed = claim_at_once(consumer)

    assert len(claimed) == len({task.pk for task in claimed}) == TASK_COUNT
    assert {(task.attempt_count, task.lease_epoch) for task in claimed} == {(2, 2)}
    assert all("lease ran out" in task.attempted_errors[0]["error"] for task in claimed)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("set_by", ["settings", "server"])
def test_claimers_do_not_fail_under_a_stricter_default_isolation(
    consumer: Consumer, stricter_default: Callable[[str, str], None], level: str, set_by: str
):
    stricter_default(set_by, level)

    claimed = claim_at_once(consumer)

    assert len(claimed) == len({task.pk for task in claimed}) == TASK_COUNT
