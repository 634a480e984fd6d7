"""A long queue: pulls follow each other, as long as what they lease is also ended."""

import threading
from typing import Any

import pytest

from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.worker import acknowledger, loop, puller
from tests.concurrency import wait_until
from tests.worker.working import PATIENCE, accept, announce, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)


def test_full_pulls_follow_each_other_without_a_look(
    monkeypatch: pytest.MonkeyPatch, looks: list[None]
):
    monkeypatch.setattr(puller, "LOOK_EVERY", PATIENCE)
    accept("full")
    announce(300)

    assert work_off("full", batch_size=10, concurrency=2) == 300
    assert len(looks) < 15, "thirty pulls at least"


def test_no_more_is_leased_while_verdicts_are_not_written(
    monkeypatch: pytest.MonkeyPatch, looks: list[None]
):
    """What waits to be written is leased, and in memory."""
    monkeypatch.setattr(acknowledger, "BATCH_MAX", 10)
    gate, write_ack = threading.Event(), lease.ack

    def ack_later(*args: Any, **kwargs: Any) -> set[int]:
        gate.wait(PATIENCE)
        return write_ack(*args, **kwargs)

    monkeypatch.setattr(lease, "ack", ack_later)
    accept("fast")
    announce(300)

    with working("fast", batch_size=10, concurrency=2) as worker:
        wait_until(lambda: worker.handled_count >= 20 and is_resting(worker), PATIENCE)
        seen = len(looks)
        wait_until(lambda: len(looks) >= seen + 3 and is_resting(worker), PATIENCE)
        leased_count = Task.objects.count()
        gate.set()
        wait_for_state(TaskState.COMPLETED, 300)
    assert leased_count < 100


def is_resting(worker: loop.WorkerLoop) -> bool:
    """Tell whether verdicts wait to be written, and nothing else is under way."""
    lanes = worker._lanes.values()
    return worker._acknowledger.is_behind and all(lane.is_idle for lane in lanes)
