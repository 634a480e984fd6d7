"""Publishers and operators, in a process of their own that writes down what it sees.

It takes orders on standard input, ``publish 20`` or ``operate 10`` or ``both 50``, and answers
each with a line when it has done that.
"""

import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import Error, ProgrammingError, connection, connections, transaction
from django.utils import timezone

from kanthorq_django import publish, publish_many, schedule
from kanthorq_django.models import Consumer, Event, Schedule, Task
from tests.faults.facts import COMMITTED, IN_DOUBT, ROLLED_BACK
from tests.faults.subscribers import history, pause
from tests.faults.workload import STREAM
from tests.ledger.models import Entry

PUBLISHERS = 2
OPERATED = "cancellable"
PAUSE = 0.02  # seconds, at most, between two transactions of a client
AFTER_AN_ERROR = 0.1  # seconds


class _ChangedMind(Exception):
    """The publisher rolls back."""


class Publisher:
    """Publishes in transactions of all kinds, each with a business row beside every event."""

    def __init__(self, seed: str) -> None:
        self._chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
        self._seed = seed
        self._number = 0

    def step(self) -> None:
        """Run one transaction; an error is written down and is no reason to stop."""
        self._number += 1
        events = [self._event() for _ in range(self._chance.choice([1, 1, 2, 5]))]
        is_wanted = self._chance.random() > 0.1
        call = history().begin("publish", events=[str(event.pk) for event in events])
        is_committing = False
        try:
            with transaction.atomic():
                self._write(events)
                pause(self._chance.random() * 0.01)
                if not is_wanted:
                    raise _ChangedMind  # noqa: TRY301  # what rolls back is the block
                is_committing = True
        except _ChangedMind:
            history().note(call, outcome=ROLLED_BACK)
        except Error as error:
            # Before COMMIT was sent a lost connection has rolled back for certain.
            outcome = IN_DOUBT if is_committing else ROLLED_BACK
            history().note(call, outcome=outcome, error=repr(error))
            connections.close_all()
            pause(AFTER_AN_ERROR)
        else:
            history().note(call, outcome=COMMITTED)

    def _event(self) -> Event:
        # As bodies a replay of the seed publishes the same; ids are new each time.
        body = f"{self._seed} {self._number} {self._chance.random()}"
        is_later = self._chance.random() < 0.1
        due = timezone.now() + timedelta(seconds=1) if is_later else None
        key = self._chance.choice(["", "a", "b", "c"])
        return Event(subject="order.made", body=body, resource_key=key, schedule_at=due)

    def _write(self, events: list[Event]) -> None:
        Entry.objects.bulk_create(Entry(event_id=event.pk, note="published") for event in events)
        if len(events) > 2:
            with transaction.atomic():
                publish_many(events, stream=STREAM)
        else:
            for event in events:
                Event.objects.publish([event], stream=STREAM)


class Operator:
    """Cancels and resumes tasks of one consumer at random."""

    def __init__(self, seed: str) -> None:
        self._chance = random.Random(seed)  # noqa: S311  # repeatable on purpose

    def step(self) -> None:
        verb = self._chance.choice(["cancel", "cancel", "stop", "resume"])
        call = history().begin("operate", verb=verb, consumer=OPERATED)
        try:
            self._operate(verb, call)
        except (Error, Consumer.DoesNotExist) as error:
            history().note(call, outcome=IN_DOUBT, error=repr(error))
            connections.close_all()
            pause(AFTER_AN_ERROR)

    def _operate(self, verb: str, call: str) -> None:
        consumer = Consumer.objects.get(name=OPERATED)
        tasks = Task.objects.filter(consumer=consumer).order_by("-id")
        ids = list(tasks.values_list("event_id", flat=True)[:50])
        chosen = self._chance.sample(ids, min(len(ids), 10))
        if verb == "resume":
            outcome = consumer.resume(chosen)
        else:
            outcome = consumer.cancel(chosen, running=verb == "stop")
        updated = [str(event) for event in outcome.updated]
        history().note(call, outcome=COMMITTED, updated=updated)


def tick(occurrences: int) -> None:
    """Let a schedule be late by so many occurrences, all of which are to be caught up."""
    first = timezone.now().replace(second=0, microsecond=0) - timedelta(minutes=occurrences)
    last = first + timedelta(minutes=occurrences - 1)
    name = f"tick-{time.time_ns()}"
    schedule(
        name,
        rrule=f"FREQ=MINUTELY;UNTIL={last:%Y%m%dT%H%M%SZ}",
        dtstart=first,
        subject="tick.due",
        stream=STREAM,
        catchup="all",
    )
    Schedule.objects.filter(name=name).update(next_at=first)


def say(subject: str, body: Any = "") -> None:
    """Publish one event of its own kind, outside of the random ones."""
    deadline = time.monotonic() + 20
    while not _has_said(subject, body):
        assert time.monotonic() < deadline, "the database is away for too long"
        pause(AFTER_AN_ERROR)


def _has_said(subject: str, body: Any) -> bool:
    call = history().begin("publish")
    try:
        with transaction.atomic():
            event = publish(subject, body, stream=STREAM)
            history().note(call, events=[str(event.pk)])
            Entry.objects.create(event_id=event.pk, note="published")
    except Error as error:
        history().note(call, outcome=IN_DOUBT, error=repr(error))
        connections.close_all()
        return False
    history().note(call, outcome=COMMITTED)
    return True


def flood(subject: str, count: int) -> None:
    """Publish many events in one transaction, each with a business row."""
    call = history().begin("publish")
    with transaction.atomic():
        events = publish_many([Event(subject=subject) for _ in range(count)], stream=STREAM)
        rows = (Entry(event_id=event.pk, note="published") for event in events)
        Entry.objects.bulk_create(rows, batch_size=1_000)
        history().note(call, events=[str(event.pk) for event in events])
    history().note(call, outcome=COMMITTED)


def straddle() -> None:
    """Commit an early event only once a later one has been delivered."""
    call = history().begin("publish")
    with transaction.atomic():
        event = publish("order.straddled", stream=STREAM)
        Entry.objects.create(event_id=event.pk, note="published")
        history().note(call, events=[str(event.pk)])
        later = threading.Thread(target=_say_and_wait, args=[event.pk])
        later.start()
        later.join()
    history().note(call, outcome=COMMITTED)


def _say_and_wait(earlier: UUID) -> None:
    say("order.late")
    delivered = Task.objects.filter(event_id__gt=earlier)
    deadline = time.monotonic() + 20
    while not delivered.exists():
        assert time.monotonic() < deadline, "an open transaction held up the events of others"
        pause(0.01)
    connections.close_all()


class Forgetful:
    """Prepares transactions, and commits them when it remembers; sessions end, these do not."""

    def __init__(self) -> None:
        self._calls: dict[str, str] = {}
        self._prepared: set[str] = set()

    def forget(self, name: str) -> None:
        """Prepare a transaction that publishes."""
        self._calls[name] = history().begin("publish")
        with suppress(Error):
            connection.set_autocommit(False)
            event = publish("order.forgotten", stream=STREAM)
            history().note(self._calls[name], events=[str(event.pk)])
            Entry.objects.create(event_id=event.pk, note="published")
            with connection.cursor() as cursor:
                cursor.execute(f"PREPARE TRANSACTION '{name}'")
            self._prepared.add(name)

    def remember(self, name: str) -> None:
        """Commit it, if there ever was one."""
        deadline = time.monotonic() + 40
        while not self._is_committed(name):
            assert time.monotonic() < deadline, "the database is away for too long"
            pause(AFTER_AN_ERROR)
        is_sure = name in self._prepared
        history().note(self._calls[name], outcome=COMMITTED if is_sure else IN_DOUBT)

    def _is_committed(self, name: str) -> bool:
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"COMMIT PREPARED '{name}'")
        except ProgrammingError:  # gone: never prepared, or committed without an answer
            return True
        except Error:
            connections.close_all()
            return False
        self._prepared.add(name)
        return True


class Client:
    """Everybody who is not a worker."""

    def __init__(self, seed: str) -> None:
        self._publishers = [Publisher(f"{seed} {number}") for number in range(PUBLISHERS)]
        self._operator = Operator(seed)
        self._forgetful = Forgetful()
        self._chance = random.Random(seed)  # noqa: S311  # repeatable on purpose

    def obey(self, order: str) -> None:
        """Carry out ``verb argument``; a verb is a method of that name."""
        verb, _, argument = order.partition(" ")
        getattr(self, verb)(argument)

    def publish(self, count: str) -> None:
        self._at_once(int(count), *(one.step for one in self._publishers))

    def operate(self, count: str) -> None:
        self._at_once(int(count), self._operator.step)

    def both(self, count: str) -> None:
        steps = (one.step for one in self._publishers)
        self._at_once(int(count), *steps, self._operator.step)

    def tick(self, occurrences: str) -> None:
        tick(int(occurrences))

    def say(self, argument: str) -> None:
        say(*argument.split(" ", 1))

    def flood(self, argument: str) -> None:
        subject, _, count = argument.partition(" ")
        flood(subject, int(count))

    def straddle(self, _: str) -> None:
        straddle()

    def forget(self, name: str) -> None:
        self._forgetful.forget(name)

    def remember(self, name: str) -> None:
        self._forgetful.remember(name)

    def _at_once(self, count: int, *steps: Callable[[], None]) -> None:
        """Share ``count`` steps among threads, one for each kind of step."""
        threads = [
            threading.Thread(target=self._repeat, args=[step, -(-count // len(steps))])
            for step in steps
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, step: Callable[[], None], count: int) -> None:
        for _ in range(count):
            step()
            pause(self._chance.random() * PAUSE)
        connections.close_all()


def main(seed: str) -> None:
    client = Client(seed)
    history()
    for line in sys.stdin:
        client.obey(line.strip())
        connections.close_all()
        sys.stdout.write("done\n")
        sys.stdout.flush()
