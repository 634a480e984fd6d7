"""Publishers against pullers on connections of their own, and the sets that tell who won."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import pytest
from django.db import OperationalError, connections, transaction

from kanthorq_django import publish, publish_many, sql
from kanthorq_django.models import Event, Stream, Task
from kanthorq_django.sql.result import Result

DEADLINE = 20.0  # seconds after which something that should happen counts as never happening
UNIQUE_GUARD = "ON CONFLICT (consumer_id, event_id) DO NOTHING"


class Verdict(NamedTuple):
    """What is wrong with a delivery; three empty sets if nothing is."""

    lost: set[UUID]  # committed, never delivered
    doubled: set[UUID]  # delivered more than once
    ghosts: set[UUID]  # delivered, never committed


CLEAN = Verdict(set(), set(), set())


def judge(committed: Iterable[UUID], delivered: Iterable[UUID]) -> Verdict:
    counts = Counter(delivered)
    wanted = set(committed)
    return Verdict(
        lost=wanted - counts.keys(),
        doubled={event_id for event_id, count in counts.items() if count > 1},
        ghosts=counts.keys() - wanted,
    )


BODY = b"some bytes"


class Reader(Protocol):
    """A consumer, or a broken one."""

    stream_id: int

    @property
    def using(self) -> str: ...

    def pull(self, limit: int) -> list[Task]: ...


class Race:
    """One consumer, many publishers and pullers; ``committed`` and ``delivered`` are event ids."""

    def __init__(self, consumer: Reader, *, seed: int, transactions: int = 40) -> None:
        self.consumer = consumer
        self.using = consumer.using
        self.stream = Stream.objects.using(self.using).get(pk=consumer.stream_id).name
        self.committed: list[UUID] = []
        self.delivered: list[UUID] = []
        self.errors: list[BaseException] = []
        self._seed = seed
        self._transactions = transactions
        self._published = threading.Event()
        self._delivery = threading.Condition()

    @property
    def verdict(self) -> Verdict:
        return judge(self.committed, self.delivered)

    def run(self, *, publishers: int = 5, limits: Iterable[int] = (3, 7, 50)) -> None:
        """Let them loose; return when all is published and delivered, or a puller has failed."""
        pullers = [self._thread(self._pull, limit) for limit in limits]
        others = [self._thread(self._write_something_else), self._thread(self._straddle)]
        writers = [self._thread(self._publish, number) for number in range(publishers)]
        for thread in pullers + others + writers:
            thread.start()
        for thread in writers + others[1:]:
            thread.join()
        self._published.set()
        for thread in pullers + others[:1]:
            thread.join()
        if not self.errors:
            self._deliver_rest()

    def _thread(self, work: Callable[..., None], *args: int) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except BaseException as error:  # noqa: BLE001  # the test looks at it, whatever it is
                with self._delivery:
                    self.errors.append(error)
                    self._delivery.notify_all()
                self._published.set()
            finally:
                connections.close_all()

        return threading.Thread(target=run)

    def _pull(self, limit: int) -> None:
        while not self._published.is_set():
            self._deliver(limit)
            time.sleep(0.001)

    def _deliver(self, limit: int) -> bool:
        tasks = self.consumer.pull(limit)
        with self._delivery:
            self.delivered += [task.event_id for task in tasks]
            self._delivery.notify_all()
        return bool(tasks)

    def _deliver_rest(self) -> None:
        while self._deliver(50):
            pass

    def _write_something_else(self) -> None:
        """Hold a transaction open for the whole race: it must delay nobody."""
        with transaction.atomic(using=self.using):
            execute(self.using, "SELECT pg_current_xact_id()")
            self._published.wait()

    def _straddle(self) -> None:
        """Commit an early event only once later ones of others have been delivered."""
        with transaction.atomic(using=self.using):
            event = publish("race.straddled", stream=self.stream, using=self.using)
            with self._delivery:
                is_overtaken = self._delivery.wait_for(
                    lambda: any(later > event.id for later in self.delivered) or self.errors,
                    DEADLINE,
                )
        assert is_overtaken, "an open transaction held up the events of others"
        self.committed.append(event.id)

    def _publish(self, number: int) -> None:
        chance = random.Random(self._seed * 1_000 + number)  # noqa: S311  # repeatable on purpose
        for _ in range(self._transactions):
            published: list[UUID] = []
            try:
                self._publish_once(chance, published)
            except OperationalError:  # a serialization failure; nothing was published
                continue
            self.committed += published
            pause(chance)

    def _publish_once(self, chance: random.Random, published: list[UUID]) -> None:
        styles = (self._alone, self._at_once, self._savepoints, self._late_write, self._gone)
        chance.choice(styles)(chance, published)

    def _alone(self, chance: random.Random, published: list[UUID]) -> None:
        published.append(self._event())

    def _at_once(self, chance: random.Random, published: list[UUID]) -> None:
        events = [Event(subject="race.many", body=BODY) for _ in range(chance.randint(2, 40))]
        published += [
            event.id for event in publish_many(events, stream=self.stream, using=self.using)
        ]

    def _savepoints(self, chance: random.Random, published: list[UUID]) -> None:
        with transaction.atomic(using=self.using):
            published.append(self._event())
            pause(chance)
            with transaction.atomic(using=self.using):
                self._event()
                transaction.set_rollback(True, using=self.using)
            pause(chance)
            with transaction.atomic(using=self.using):
                published.append(self._event())

    def _late_write(self, chance: random.Random, published: list[UUID]) -> None:
        """Get a transaction id early, publish late, and publish again later still."""
        with transaction.atomic(using=self.using):
            execute(self.using, "SELECT pg_current_xact_id()")
            pause(chance)
            published.append(self._event())
            pause(chance)
            published.append(self._event())

    def _gone(self, chance: random.Random, published: list[UUID]) -> None:
        with transaction.atomic(using=self.using):
            self._event()
            pause(chance)
            transaction.set_rollback(True, using=self.using)

    def _event(self) -> UUID:
        return publish("race.one", BODY, stream=self.stream, using=self.using).id


def pause(chance: random.Random) -> None:
    """Widen the gaps in which others may slip in; nothing depends on how long it takes."""
    time.sleep(chance.random() * 0.008)


def execute(using: str, statement: str) -> None:
    with connections[using].cursor() as cursor:
        cursor.execute(statement)


@contextmanager
def altered(
    monkeypatch: pytest.MonkeyPatch, name: str, *changes: tuple[str, str]
) -> Iterator[None]:
    """Run the block with another text of ``<name>.sql``; each change must be one."""
    load = sql.load
    text = load(name)
    for old, new in changes:
        assert old in text, f"{name}.sql no longer says {old!r}"
        text = text.replace(old, new)

    def changed(wanted: str, **options: bool) -> str:
        return text if wanted == name else load(wanted, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sql, "load", changed)
        yield


@contextmanager
def between_lock_and_read(
    monkeypatch: pytest.MonkeyPatch, step: Callable[[], object]
) -> Iterator[None]:
    """Run the block with ``step`` done by every pull that holds its lock and has not read yet.

    Its statements are sent one after the other then, in the same order.
    """

    def in_steps(using: str, name: str, then: str, params: Any) -> tuple[list[Any], Result]:
        with sql.begun(using, name, params) as locked:
            step()
            return locked, sql.lazy_rows(using, then, params)

    with monkeypatch.context() as patch:
        patch.setattr(sql, "transaction_of", in_steps)
        yield
