"""The server dies while it publishes and pulls; among what survives nothing is lost or doubled."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest
from django.db import InterfaceError, OperationalError, connections, transaction

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.registration import Registration
from project.postgres.launcher import scratch_server
from tests.clusters.throwaway import Cluster
from tests.races.race import CLEAN, DEADLINE, UNIQUE_GUARD, altered, judge

UNAVAILABLE = (OperationalError, InterfaceError)
STREAM = "crash"


class CrashingRace:
    """Publishers and pullers that go on where a crash of the server left them."""

    def __init__(self, using: str) -> None:
        registration = Registration(STREAM, includes=[">"])
        self.using = using
        self.consumer = Consumer.objects.using(using).register("reader", registration)
        self.committed: list[UUID] = []
        self.in_doubt: list[UUID] = []  # the connection was lost before COMMIT was answered
        self.delivered: list[UUID] = []
        self.errors: list[BaseException] = []
        self._over = threading.Event()

    def run(self, crash: Callable[[], None], *, crashes: int) -> None:
        works = [*[self._publish] * 3, *[self._pull] * 3]
        threads = [threading.Thread(target=self._go_on, args=[work]) for work in works]
        for thread in threads:
            thread.start()
        try:
            for _ in range(crashes):
                self._wait_for_more(60)
                crash()
            self._wait_for_more(60)
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _go_on(self, work: Callable[[], None]) -> None:
        while not self._over.is_set() and not self.errors:
            try:
                work()
            except UNAVAILABLE:
                connections[self.using].close()
                time.sleep(0.01)
            except BaseException as error:  # noqa: BLE001  # the test looks at it
                self.errors.append(error)
        connections.close_all()

    def _publish(self) -> None:
        published: list[UUID] = []
        try:
            with transaction.atomic(using=self.using):
                published.append(publish("a.one", stream=STREAM, using=self.using).id)
                events = [Event(subject="a.many") for _ in range(3)]
                many = publish_many(events, stream=STREAM, using=self.using)
                published += [event.id for event in many]
        except UNAVAILABLE:
            self.in_doubt += published
            raise
        self.committed += published

    def _pull(self) -> None:
        self.delivered += [task.event_id for task in self.consumer.pull(7)]

    def _wait_for_more(self, count: int) -> None:
        """Wait until that many more events have been delivered."""
        wanted = len(self.delivered) + count
        deadline = time.monotonic() + DEADLINE
        while len(self.delivered) < wanted and not self.errors:
            assert time.monotonic() < deadline, "delivery has stopped"
            time.sleep(0.005)


@pytest.fixture(params=[True, False], ids=["durable", "asynchronous commit"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with scratch_server(durable=request.param) as server:
        yield Cluster(server)


def assert_complete(race: CrashingRace) -> None:
    """Assert that exactly what is stored has been delivered, once."""
    stored = set(Event.objects.using(race.using).values_list("id", flat=True))
    tasks = list(Task.objects.using(race.using).values_list("event_id", flat=True))
    assert judge(stored, tasks) == CLEAN
    assert not judge(race.committed, race.delivered).doubled
    assert stored <= {*race.committed, *race.in_doubt}
    if race_is_durable(race.using):
        assert stored >= {*race.committed, *race.delivered}


def race_is_durable(using: str) -> bool:
    with connections[using].cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        return bool(cursor.fetchone()[0] == "on")


def crash_and_check(cluster: Cluster, database: str, *, crashes: int) -> None:
    race = CrashingRace(database)
    race.run(lambda: cluster.server.restart("immediate"), crashes=crashes)
    connections[database].close()
    for _ in itertools.takewhile(bool, iter(lambda: race.consumer.pull(50), None)):
        pass
    assert race.errors == []
    assert_complete(race)


@pytest.fixture(autouse=True)
def one_line_of_defence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with altered(monkeypatch, "pull", (UNIQUE_GUARD, "")):
        yield


def test_a_crash_of_the_server_loses_and_doubles_nothing(cluster: Cluster, database: str):
    crash_and_check(cluster, database, crashes=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_crashes_lose_and_double_nothing(cluster: Cluster, database: str):
    crash_and_check(cluster, database, crashes=15)
