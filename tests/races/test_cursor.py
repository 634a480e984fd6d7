import threading
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import pytest
from django.db import IntegrityError

from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.registration import Registration
from tests.races.race import BODY, CLEAN, Race, altered, between_lock_and_read

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("one_line_of_defence"),
]


@pytest.fixture
def consumer() -> Consumer:
    return Consumer.objects.register("racer", Registration(stream="race", includes=[">"]))


@pytest.mark.parametrize("seed", range(2))
def test_every_committed_event_is_delivered_exactly_once(consumer: Consumer, seed: int):
    race = Race(consumer, seed=seed)

    race.run()

    assert race.errors == []
    assert race.verdict == CLEAN
    assert set(race.committed) == set(Event.objects.values_list("id", flat=True))
    assert Task.objects.count() == len(race.committed) > 100


class CautiousReader:
    """Has no memory for more than three bodies."""

    def __init__(self, consumer: Consumer) -> None:
        self.using, self.stream_id = consumer.using, consumer.stream_id
        self._consumer = consumer

    def pull(self, limit: int) -> list[Task]:
        while not (page := self._consumer.pull_page(limit, 3 * len(BODY))).is_idle:
            if page.leased:
                return page.tasks
        return []


def test_nothing_is_lost_or_read_twice_where_bodies_end_the_pages(consumer: Consumer):
    race = Race(CautiousReader(consumer), seed=0)

    race.run()

    assert race.errors == []
    assert race.verdict == CLEAN


class PositionReader:
    """What this project must not be: it remembers the largest id that it has read."""

    def __init__(self, consumer: Consumer) -> None:
        self.using, self.stream_id = consumer.using, consumer.stream_id
        self._position = UUID(int=0)
        self._lock = threading.Lock()

    def pull(self, limit: int) -> list[Task]:
        with self._lock:
            unread = Event.objects.filter(stream=self.stream_id, id__gt=self._position)
            tasks = [Task(event_id=event.id) for event in unread.order_by("id")[:limit]]
            self._position = tasks[-1].event_id if tasks else self._position
            return tasks


def test_the_same_race_shows_what_a_position_loses(consumer: Consumer):
    race = Race(PositionReader(consumer), seed=0)

    race.run()

    assert race.errors == []
    assert race.verdict.lost
    assert not race.verdict.ghosts


def test_the_same_race_shows_what_is_lost_without_a_look_at_late_transactions(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    look = "WHERE pg_visible_in_snapshot(open.xid, reader.horizon)"
    with altered(monkeypatch, "pull", (look, "WHERE false")):
        race = Race(consumer, seed=0)
        race.run()

    assert race.errors == []
    assert race.verdict.lost


def test_the_same_race_shows_what_is_read_twice_without_the_lock(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    two = threading.Barrier(2, timeout=1)

    def wait_for_another() -> None:
        with suppress(threading.BrokenBarrierError):
            two.wait()

    with (
        altered(monkeypatch, "lock_consumer", ("FOR NO KEY UPDATE SKIP LOCKED", "")),
        between_lock_and_read(monkeypatch, wait_for_another),
    ):
        race = Race(consumer, seed=0)
        race.run()

    assert any(isinstance(error, IntegrityError) for error in race.errors), race.verdict


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("set_by", ["settings", "server"])
def test_a_stricter_default_isolation_changes_nothing(
    consumer: Consumer, stricter_default: Callable[[str, str], None], level: str, set_by: str
):
    stricter_default(set_by, level)
    race = Race(consumer, seed=0, transactions=20)

    race.run()

    assert race.errors == []
    assert race.verdict == CLEAN


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_long_race_with_many_publishers_and_pullers(consumer: Consumer, seed: int):
    race = Race(consumer, seed=seed, transactions=300)

    race.run(publishers=10, limits=(1, 3, 3, 7, 50))

    assert race.errors == []
    assert race.verdict == CLEAN
