"""The look that a worker takes once more, for what committed soon after a notification."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from kanthorq_django import publish, subscribe
from kanthorq_django.models import TaskState, notifications
from kanthorq_django.models.cursor import peek
from kanthorq_django.worker import loop, puller, scheduler
from tests.concurrency import elsewhere
from tests.worker.working import wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)

LONG = timedelta(minutes=1)


def test_a_look_that_takes_long_does_not_stand_for_the_one_after_a_notification(monkeypatch):
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 1.0)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    monkeypatch.setattr(loop, "SETTLE_SECONDS", 1.1)
    monkeypatch.setattr(scheduler, "LOOK_EVERY", 60.0)
    unwanted = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> list[Any]:
        rows = peek(*args, **kwargs)
        if unwanted.is_set() and not any(row.has_events for row in rows):
            unwanted.clear()
            elsewhere(lambda: publish("work.wanted", stream="work"))  # which is spared
            time.sleep(1.2)
        return rows

    monkeypatch.setattr(puller, "peek", slow)
    subscribe("work.wanted", stream="work", consumer="woken")(lambda message: None)

    with working("woken", poll_interval=LONG, listen=True):
        publish("work.wanted", stream="work")
        wait_for_state(TaskState.COMPLETED)
        time.sleep(2)  # until nothing is spared any more
        unwanted.set()
        publish("work.unwanted", stream="work")
        wait_for_state(TaskState.COMPLETED, 2)
