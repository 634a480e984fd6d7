"""The database beside what is expected of it, step by step."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import connection, transaction

from kanthorq_django import publish_many
from kanthorq_django.domain.states import FINAL, LEASED, TaskState
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.registration import Registration
from tests.ledger.models import Entry
from tests.races.actors import Actor
from tests.races.expected import Expected, ExpectedConsumer, ExpectedTask

HOUR = timedelta(hours=1)
STREAM = "life"
CONSUMERS: dict[str, Registration] = {
    "plain": Registration(STREAM, [">"], attempt_max=2, visibility_timeout=HOUR),
    "careful": Registration(
        STREAM,
        ["order.>"],
        attempt_max=2,
        visibility_timeout=HOUR,
        has_cancel_handler=True,
        cancel_attempt_max=2,
    ),
    "parked": Registration(STREAM, ["order.>"], visibility_timeout=HOUR, parked=True),
    "turns": Registration(
        STREAM,
        [">"],
        attempt_max=2,
        visibility_timeout=HOUR,
        serialize="on",
        has_cancel_handler=True,
        cancel_attempt_max=1,
    ),
    "strict": Registration(
        STREAM, ["order.>"], attempt_max=3, visibility_timeout=HOUR, serialize="strict"
    ),
}
TABLES = (Entry, Task, Event, Consumer)
ROWS = """
    SELECT id, consumer_id, event_id, turn_key, state, schedule_at, lease_epoch, attempt_count,
        cancel_attempt_count, state IN (1, 2, 3, 102) AND schedule_at <= statement_timestamp()
            AS is_due,
        cancel_requested_at IS NOT NULL AS is_asked, finalized_at IS NOT NULL AS is_finalized,
        jsonb_array_length(attempted_errors) AS error_count
    FROM kanthorq_django_task
    ORDER BY id
"""


@dataclass(frozen=True)
class Hand:
    """A lease as its holder has it, over or not."""

    message: Message
    task: ExpectedTask

    @property
    def is_live(self) -> bool:
        return self.message.lease_epoch == self.task.epoch and self.task.state in LEASED

    @property
    def note(self) -> str:
        return f"{self.task.pk}:{self.message.lease_epoch}"

    def write_effect(self) -> None:
        Entry.objects.create(event_id=self.message.event.pk, note=self.note)


@dataclass
class Life:
    """What was published, pulled, leased and written; ``check()`` compares it with the rows."""

    expected: Expected = field(default_factory=Expected)
    consumers: dict[str, ExpectedConsumer] = field(default_factory=dict)
    events: dict[UUID, Event] = field(default_factory=dict)  # committed
    later: set[UUID] = field(default_factory=set)  # not due when published
    hands: list[Hand] = field(default_factory=list)
    leases: set[tuple[int, int]] = field(default_factory=set)
    effects: list[str] = field(default_factory=list)
    epochs: dict[int, int] = field(default_factory=dict)

    def begin(self, names: Iterable[str]) -> None:
        empty = ", ".join(f'"{model._meta.db_table}"' for model in TABLES)
        with connection.cursor() as cursor:
            cursor.execute(f"TRUNCATE {empty} RESTART IDENTITY CASCADE")
        for name in names:
            self.register(name, CONSUMERS[name])

    def register(self, name: str, given: Registration) -> None:
        pk = Consumer.objects.register(name, given).pk
        known = self.consumers.setdefault(name, ExpectedConsumer(pk, name))
        known.attempt_max, known.cancel_attempt_max = given.attempt_max, given.cancel_attempt_max
        known.has_cancel_handler, known.parked = given.has_cancel_handler, given.parked
        known.serialize = given.serialize
        for task in self.expected.of(known):
            if task.state not in FINAL:
                task.align()

    # Publishing and pulling

    def publish(self, events: list[Event], meanwhile: Callable[[], object] = bool) -> None:
        """Publish in one transaction, and commit it after ``meanwhile``."""
        with transaction.atomic():
            published = publish_many(events, stream=STREAM)
            meanwhile()
        self.events |= {event.pk: event for event in published}
        self.later |= {event.pk for event in published if event.schedule_at}

    def missing(self, consumer: ExpectedConsumer) -> set[UUID]:
        """Return the events that the consumer owes a task and has none for."""
        stored = Consumer(subject_includes=list(CONSUMERS[consumer.name].includes))
        known = {task.event_id for task in self.expected.of(consumer)}
        owed = {pk for pk, event in self.events.items() if stored.selects(event.subject)}
        return owed - known

    def pull(self, consumer: ExpectedConsumer, limit: int, actor: Actor) -> bool:
        """Pull once; return whether there may be more."""
        missing = self.missing(consumer)
        tasks = actor.do(lambda: Consumer.objects.get(pk=consumer.pk).pull(limit))
        stored = Task.objects.filter(consumer_id=consumer.pk, event_id__in=missing)
        made = [self._add(consumer, *row) for row in stored.values_list("pk", "event_id")]
        assert {task.pk for task in tasks} == {t.pk for t in made if t.state == TaskState.RUNNING}
        assert tasks or not self.missing(consumer), "an event was passed over"
        self.take(tasks)
        return bool(tasks)

    def _add(self, consumer: ExpectedConsumer, pk: int, event_id: UUID) -> ExpectedTask:
        key, is_due = self.events[event_id].resource_key, event_id not in self.later
        task = ExpectedTask(pk, event_id, consumer, key, None, TaskState.AVAILABLE, is_due)
        task.align()
        if consumer.parked:
            task.state = TaskState.PENDING
        elif is_due and not task.turn_key:
            task.state, task.is_due, task.epoch, task.attempts = TaskState.RUNNING, False, 1, 1
        self.expected.tasks[pk] = task
        return task

    # Leases

    def take(self, tasks: Iterable[Task]) -> None:
        """Hold what a pull or a claim leased; no lease is ever given twice."""
        for task in tasks:
            name = task.lease[:2]  # unique even without its moment
            assert name not in self.leases, "a lease was given twice"
            self.leases.add(name)
            self.hands.append(Hand(Message(task), self.expected.tasks[task.pk]))

    def claimed(self, tasks: list[Task], expected: list[ExpectedTask]) -> None:
        """Compare what a claim returned with what it should have."""
        found = [(task.pk, task.lease_epoch) for task in tasks]
        wanted = sorted((task.pk, task.epoch) for task in expected)
        assert found == wanted, f"leased {found}, not {wanted}"
        self.take(tasks)

    def drop(self, hands: Iterable[Hand]) -> None:
        gone = list(hands)
        self.hands = [hand for hand in self.hands if hand not in gone]

    # What must always hold

    def check(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute(ROWS)
            names = [column.name for column in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        self._check_rows(rows)
        self._check_hands(rows)
        self._check_turns(rows)
        self._check_effects(rows)

    def _check_rows(self, rows: list[dict[str, Any]]) -> None:
        assert [row["id"] for row in rows] == sorted(self.expected.tasks)
        assert len({(row["consumer_id"], row["event_id"]) for row in rows}) == len(rows)
        for row in rows:
            task = self.expected.tasks[row["id"]]
            wanted = task.row()
            found = {name: row[name] for name in wanted}
            assert found == wanted, f"{found} is not {wanted}"
            assert row["is_finalized"] == (row["state"] in FINAL)
            assert row["lease_epoch"] >= self.epochs.get(task.pk, 0)
            assert min(row["attempt_count"], row["cancel_attempt_count"]) >= 0
            self.epochs[task.pk] = row["lease_epoch"]
            moment: datetime = row["schedule_at"]
            task.schedule_at = moment

    def _check_hands(self, rows: list[dict[str, Any]]) -> None:
        """Nobody can end a task but one holder of a lease of it."""
        can_end = {(row["id"], row["lease_epoch"]) for row in rows if row["state"] in LEASED}
        held = Counter(h.task.pk for h in self.hands if h.message.lease[:2] in can_end)
        assert all(count == 1 for count in held.values()), "two hold one task"

    def _check_turns(self, rows: list[dict[str, Any]]) -> None:
        """All live leases of a key were given by one claim, which may lease a group."""
        turns: dict[tuple[int, str], set[int]] = {}
        for row in rows:
            turn = self.expected.tasks[row["id"]].turn
            if row["state"] == TaskState.RUNNING and not row["is_due"] and row["turn_key"] and turn:
                turns.setdefault((row["consumer_id"], row["turn_key"]), set()).add(turn)
        assert all(len(given) == 1 for given in turns.values()), "a key is served twice"

    def _check_effects(self, rows: list[dict[str, Any]]) -> None:
        notes = sorted(Entry.objects.values_list("note", flat=True))
        assert notes == sorted(self.effects)
        assert len(set(notes)) == len(notes), "an effect was written twice for one lease"
        done = {f"{r['id']}:{r['lease_epoch']}" for r in rows if r["state"] == TaskState.COMPLETED}
        assert done <= set(notes), "a task was completed without its effect"
