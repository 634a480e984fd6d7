"""The puller step by step: what it remembers from one look to the next, and until when."""

import threading
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now

from kanthorq_django import publish_many
from kanthorq_django.models import Event, Task, TaskState
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.leased import Leased
from kanthorq_django.models.delivery.turns import turns_locked
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker import puller
from kanthorq_django.worker.lanes.lane import Lane
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.puller import Look, Puller
from kanthorq_django.worker.pulling import floors, pause, turn_watch
from kanthorq_django.worker.pulling.demand import Demand
from tests.concurrency import begin_elsewhere
from tests.worker.working import PATIENCE, accept, announce

pytestmark = pytest.mark.django_db(transaction=True)

DUE = Look(has_events=False, due_in=0.0)


def make_puller(*names: str, **options: Any) -> Puller:
    return Puller(sync(names), WorkerOptions(**options), "default", nullcontext)


def fetch(reader: Puller, look: Look, at_once: int = 10) -> list[Leased]:
    """Fetch for the only consumer of ``reader``."""
    (consumer,) = reader._consumers.values()
    lane = Lane(at_once, lambda endings: None, lambda: None)
    lanes = {False: lane, True: lane}
    demand = Demand(find(consumer.name), lanes, at_once, lambda: at_once)
    return [each for haul in reader.fetch(consumer, look, demand) for each in haul.leased]


def has_work(reader: Puller) -> bool:
    """Tell whether a look finds work for somebody who is not left alone."""
    return any(reader.in_turn(reader.look(is_quiet=False)))


def pull_once(reader: Puller, at_once: int) -> list[Leased]:
    return fetch(reader, Look(has_events=True, due_in=None), at_once)


@pytest.fixture
def waiting_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a task wait for another one of its key, which runs; who found that waits for long."""
    monkeypatch.setattr(pause, "PAUSE_FIRST", 3_600.0)
    monkeypatch.setattr(puller, "PAUSE_LONGEST", 3_600.0)
    accept("keyed", serialize=True)
    (consumer,) = sync(["keyed"])
    publish_many([Event(subject="work.due", resource_key="a") for _ in range(2)], stream="work")
    consumer.pull(2)
    consumer.claim(2)
    assert Task.objects.running().count() == 1


@pytest.mark.usefixtures("waiting_key")
def test_turns_of_a_key_that_is_not_free_are_not_asked_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(turn_watch, "TURNS_AGAIN", 3_600.0)
    reader = make_puller("keyed")
    assert has_work(reader)
    assert fetch(reader, DUE) == []
    assert not has_work(reader)
    reader.resume("other")
    assert not has_work(reader)
    reader.resume("keyed")
    assert has_work(reader)


@pytest.mark.usefixtures("waiting_key")
def test_turns_that_are_all_given_keep_nobody_from_new_events():
    reader = make_puller("keyed")
    assert fetch(reader, DUE) == []
    announce()
    assert has_work(reader)


@pytest.mark.usefixtures("waiting_key")
def test_a_key_that_becomes_free_during_a_claim_is_asked_for_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    """The claim has not seen it, and nobody says so again."""
    reader = make_puller("keyed")

    def claim_meanwhile(*args: Any) -> list[Leased]:
        leased = claim_due(*args)
        reader.resume("keyed")  # as the thread does that has written a verdict
        return leased

    monkeypatch.setattr(turn_watch, "TURNS_AGAIN", 3_600.0)
    monkeypatch.setattr(puller, "claim_due", claim_meanwhile)
    assert fetch(reader, DUE) == []
    assert has_work(reader)


@pytest.mark.usefixtures("waiting_key")
def test_a_burst_asks_once_more_for_turns_when_nothing_of_its_own_runs(
    monkeypatch: pytest.MonkeyPatch,
):
    """Those that it asked for in vain meanwhile may be free by then; it waits for no others."""
    monkeypatch.setattr(turn_watch, "TURNS_AGAIN", 3_600.0)
    reader = make_puller("keyed", burst=True)
    assert has_work(reader)
    assert fetch(reader, DUE) == []
    assert not has_work(reader)
    (look,) = reader.look(is_quiet=True).values()
    assert look.is_due
    assert fetch(reader, look) == []
    (look,) = reader.look(is_quiet=True).values()
    assert not look.has_work
    assert look.due_in is None


@pytest.mark.usefixtures("waiting_key")
def test_who_asked_for_turns_in_vain_for_long_asks_soon_again_once_a_key_was_free():
    reader = make_puller("keyed")
    for _ in range(10):
        assert fetch(reader, DUE) == []
    assert reader.rest(reader.look(is_quiet=False)) > 2 * turn_watch.TURNS_AGAIN
    reader.resume("keyed")
    assert fetch(reader, DUE) == []
    assert reader.rest(reader.look(is_quiet=False)) <= turn_watch.TURNS_AGAIN


@pytest.mark.usefixtures("waiting_key")
def test_a_key_that_becomes_free_ends_the_pause_of_who_found_others_at_its_turns():
    reader = make_puller("keyed")
    (consumer,) = sync(["keyed"])
    others_have_it, may_end = threading.Event(), threading.Event()

    def give_turns() -> None:
        with turns_locked(consumer) as is_ours:
            assert is_ours
            others_have_it.set()
            may_end.wait(PATIENCE)

    giving = begin_elsewhere(give_turns)
    try:
        assert others_have_it.wait(PATIENCE)
        assert fetch(reader, DUE) == []
    finally:
        may_end.set()
        giving.result(PATIENCE)
    assert not has_work(reader)
    reader.resume("keyed")
    assert has_work(reader)


def test_only_a_full_pull_of_a_single_consumer_stands_for_a_look():
    accept("full")
    reader = make_puller("full")
    announce(3)
    assert len(pull_once(reader, 2)) == 2
    assert reader.guess(set())
    assert len(pull_once(reader, 2)) == 1
    assert not reader.guess(set())


def test_where_a_task_is_due_no_pull_stands_for_a_look():
    """Or old obligations would wait for as long as new events come."""
    accept("full")
    reader = make_puller("full")
    announce(5)
    assert len(pull_once(reader, 1)) == 1
    Task.objects.update(state=TaskState.RETRYABLE, schedule_at=Now())
    (look,) = reader.look(is_quiet=False).values()
    assert look.is_due
    assert len(pull_once(reader, 1)) == 1
    assert not reader.guess(set())
    assert fetch(reader, look, 1)
    reader.look(is_quiet=False)
    assert len(pull_once(reader, 1)) == 1
    assert reader.guess(set())


def test_the_full_pull_of_one_consumer_does_not_stand_for_a_look_at_another():
    accept("full")
    accept("other")
    reader = make_puller("full", "other")
    announce(3)
    (consumer, _) = reader._consumers.values()
    lane = Lane(1, lambda endings: None, lambda: None)
    demand = Demand(find("full"), {False: lane, True: lane}, 1, lambda: 1)
    look = reader.look(is_quiet=True)[consumer.pk]
    (haul,) = reader.fetch(consumer, look, demand)
    assert len(haul.leased) == 1
    assert not reader.guess(set())


def test_a_burst_is_over_only_where_a_look_from_the_beginning_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(floors, "FULL_EVERY", 3_600.0)
    accept("early")
    ends, goes_on = make_puller("early", burst=True), make_puller("early")
    announce()
    assert len(pull_once(ends, 10)) == 1
    Task.objects.update(state=TaskState.RETRYABLE, schedule_at=Now())
    assert has_work(ends)
    assert has_work(goes_on)
    Task.objects.update(schedule_at=Now() - timedelta(hours=1))  # as a transaction that took long
    assert has_work(ends)
    assert not has_work(goes_on)  # for now
