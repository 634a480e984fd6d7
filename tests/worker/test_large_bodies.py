"""What bounds the memory of a worker where bodies are large, and what it does when it is short."""

import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from django.db import OperationalError
from django.db.models.functions import Now

from kanthorq_django import publish_many, subscribe
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.cursor import Page
from kanthorq_django.models.delivery.leased import Leased
from kanthorq_django.subscribers import sync
from kanthorq_django.worker import puller
from kanthorq_django.worker.lanes import lane
from kanthorq_django.worker.lanes.throughput import Throughput
from kanthorq_django.worker.pulling import answer_size
from kanthorq_django.worker.pulling.answer_size import ONE_TASK, SMALLEST, AnswerSize
from tests.concurrency import wait_until
from tests.worker.working import (
    PATIENCE,
    accept,
    has_state,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

SIZE = 10_000
AT_ONCE = 10 * SIZE
CONCURRENCY = 2
LIBPQ_SAYS = "out of memory for query result\n"


def announce_large(count: int) -> None:
    events = [Event(subject="work.due", body=b"x" * SIZE) for _ in range(count)]
    publish_many(events, stream="work")


@pytest.fixture
def small_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ten bodies fill an answer."""
    monkeypatch.setattr(answer_size, "BODIES_SIZE_MAX", AT_ONCE)
    monkeypatch.setattr(lane, "BODIES_SIZE_MAX", AT_ONCE)
    monkeypatch.setattr(answer_size, "SMALLEST", SIZE)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds handlers up."""
    made = threading.Event()
    yield made
    made.set()


@pytest.mark.usefixtures("small_answers")
@pytest.mark.parametrize("batch", [1, 3])
def test_bodies_that_wait_leave_room_for_no_others(
    batch: int, gate: threading.Event, looks: list[None], monkeypatch: pytest.MonkeyPatch
):
    """However fast the handlers have been until now."""
    monkeypatch.setattr(Throughput, "per_second", lambda *_: 1_000)
    entered: list[None] = []

    def handle(_: Any) -> None:
        entered.append(None)
        gate.wait(2 * PATIENCE)

    subscribe("work.>", stream="work", consumer="large", batch=batch)(handle)
    announce_large(100)
    with working("large", concurrency=CONCURRENCY) as worker:
        wait_until(lambda: len(entered) == CONCURRENCY, PATIENCE)
        seen = len(looks)
        wait_until(lambda: len(looks) >= seen + 4, PATIENCE)
        leased_count = Task.objects.filter(schedule_at__gt=Now()).count()
        gate.set()
        wait_until(lambda: worker.handled_count == 100, PATIENCE)
    # Less than an answer waits where another one is asked for.
    assert leased_count < CONCURRENCY * batch + 2 * AT_ONCE // SIZE


@pytest.mark.usefixtures("small_answers")
def test_pages_that_are_cut_follow_each_other_without_a_look(
    looks: list[None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(puller, "LOOK_EVERY", PATIENCE)
    accept("large")
    announce_large(200)

    assert work_off("large", concurrency=CONCURRENCY, batch_size=100) == 200
    assert len(looks) < 12, "twenty pulls at least"


@pytest.mark.usefixtures("small_answers")
@pytest.mark.parametrize("step", ["pull", "claim"])
@pytest.mark.parametrize("error", [OperationalError(LIBPQ_SAYS), MemoryError()])
def test_no_task_is_twice_in_an_answer_that_does_not_fit(
    step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    accept("large", attempt_max=3)
    announce_large(60)
    if step == "claim":
        sync(["large"])
        Consumer.objects.get(name="large").pull(100)
        Task.objects.update(schedule_at=Now())
    lost = lose_what_exceeds(3 * SIZE, error, monkeypatch)

    with working("large", concurrency=CONCURRENCY):
        wait_until(lambda: lost and has_state(TaskState.COMPLETED, 60 - len(lost)), PATIENCE)
        Task.objects.running().update(schedule_at=Now())  # nobody knows of these leases
        wait_for_state(TaskState.COMPLETED, 60)
    assert len(lost) == len(set(lost)) < 20


def lose_what_exceeds(size: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """Let answers get lost, once they are committed, that have bodies of more than ``size`` bytes.

    Returns the events that were in them.
    """
    lost: list[UUID] = []
    pull_page = Consumer.pull_page

    def received(leased: list[Leased]) -> list[Leased]:
        if sum(each.body_size for each in leased) > size:
            lost.extend(each.event_id for each in leased)
            raise error
        return leased

    def pull(consumer: Consumer, *asked: int) -> Page:
        page = pull_page(consumer, *asked)
        received(page.leased)
        return page

    monkeypatch.setattr(Consumer, "pull_page", pull)
    monkeypatch.setattr(puller, "claim_due", lambda *asked: received(claim_due(*asked)))
    return lost


def test_what_does_not_fit_is_never_asked_for_again():
    size = AnswerSize()
    whole = size.bytes_max
    size.did_not_fit()
    assert size.bytes_max == ONE_TASK
    for _ in range(100):
        size.fitted()
    assert size.bytes_max == whole // 2


def test_small_bodies_come_in_hundreds_however_short_memory_was():
    size = AnswerSize()
    for _ in range(100):
        size.did_not_fit()
    for _ in range(100):
        size.fitted()
    assert size.bytes_max == SMALLEST
