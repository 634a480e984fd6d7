"""What should become of tasks: their life told a second time, in plain Python and slowly.

Moments are told as "due" or "not yet": what waits in a test waits for an hour.
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from kanthorq_django.conf import get_settings
from kanthorq_django.domain import states
from kanthorq_django.domain.states import CLAIMABLE, FINAL, LEASED, TaskState

S = TaskState
OPERATED: dict[str, states.Move] = {
    "cancel": states.CANCEL,
    "resume": states.RESUME,
    "release": states.RELEASE,
    "reset": states.RESET,
}


@dataclass(eq=False)
class ExpectedConsumer:
    pk: int
    name: str
    attempt_max: int = 16
    cancel_attempt_max: int = 16
    has_cancel_handler: bool = False
    serialize: str = ""
    parked: bool = False


@dataclass(eq=False)
class ExpectedTask:
    pk: int
    event_id: UUID
    consumer: ExpectedConsumer
    key: str
    turn_key: str | None
    state: TaskState
    is_due: bool
    epoch: int = 0
    attempts: int = 0
    cancel_attempts: int = 0
    is_asked: bool = False
    is_cleaning: bool = False  # the lease of a cleanup is out, or has run out
    errors: int = 0
    # As the database has it: only for the order of claims.
    schedule_at: datetime = datetime.min  # noqa: DTZ901  # replaced before it is compared
    # The claim that leased it in its turn; 0 if it needed none.
    turn: int = 0

    def row(self) -> dict[str, Any]:
        """Return what the stored row should say."""
        return {
            "turn_key": self.turn_key,
            "state": self.state,
            "is_due": self.state in CLAIMABLE and self.is_due,
            "lease_epoch": self.epoch,
            "attempt_count": self.attempts,
            "cancel_attempt_count": self.cancel_attempts,
            "is_asked": self.is_asked,
            "is_finalized": self.state in FINAL,
            "error_count": self.errors,
        }

    @property
    def is_claimable(self) -> bool:
        return self.state in CLAIMABLE and self.is_due

    @property
    def cancelled_state(self) -> TaskState:
        return S.CANCELLING if self.consumer.has_cancel_handler else S.CANCELLED

    def become(self, verb: str, state: TaskState) -> TaskState:
        """Move to ``state`` and return the one that was left."""
        assert state in states.targets(verb, self.state), (verb, self.state, state)
        was, self.state = self.state, state
        return was

    # What workers do

    def claim(self, turn: int) -> None:
        was = self.become("claim", self._claimed_state())
        self.epoch += 1
        self.turn = turn
        if self.state == S.RUNNING:
            self.attempts += 1
        if self.state == S.CANCELLING:
            self.cancel_attempts = self.cancel_attempts + 1 if was == S.CANCELLING else 1
        if was == S.RUNNING or self.state == S.DISCARDED or self.is_cleaning:
            self._note_error()
        self.is_cleaning = self.state == S.CANCELLING
        if self.state in LEASED:
            self.is_due = False

    def _claimed_state(self) -> TaskState:
        if self.state == S.CANCELLING:
            if not self.consumer.has_cancel_handler:
                return S.CANCELLED
            is_used_up = self.cancel_attempts >= self.consumer.cancel_attempt_max
            return S.DISCARDED if is_used_up else S.CANCELLING
        if self.state == S.RUNNING:
            if self.is_asked:
                return self.cancelled_state
            if self.attempts >= self.consumer.attempt_max:
                return S.DISCARDED
        return S.RUNNING

    def ack(self) -> None:
        self.is_cleaning = False
        self.become("ack", S.COMPLETED if self.state == S.RUNNING else S.CANCELLED)

    def nack(self, *, is_delayed: bool) -> None:
        was = self.become("nack", self._failed_state())
        self._note_error()
        self._wait(was, is_delayed=is_delayed)
        if (was, self.state) == (S.RUNNING, S.CANCELLING):
            self.cancel_attempts = 0

    def _failed_state(self) -> TaskState:
        if self.state == S.CANCELLING:
            is_used_up = self.cancel_attempts >= self.consumer.cancel_attempt_max
            return S.DISCARDED if is_used_up else S.CANCELLING
        if self.is_asked:
            return self.cancelled_state
        return S.RETRYABLE if self.attempts < self.consumer.attempt_max else S.DISCARDED

    def hand_back(self, *, is_delayed: bool) -> None:
        if self.state == S.CANCELLING:
            was = self.become("hand_back", S.CANCELLING)
            self.cancel_attempts -= 1
        else:
            was = self.become("hand_back", self.cancelled_state if self.is_asked else S.AVAILABLE)
            self.attempts -= 1
            self.cancel_attempts = 0
        self._wait(was, is_delayed=is_delayed)

    def _wait(self, was: TaskState, *, is_delayed: bool) -> None:
        self.is_cleaning = False
        begins_cancelling = was == S.RUNNING and self.state == S.CANCELLING
        self.is_due = begins_cancelling or not is_delayed
        self.epoch += self.state == S.CANCELLING

    def _note_error(self) -> None:
        self.errors = min(self.errors + 1, get_settings().ERRORS_MAX)

    # What operators do

    def cancel(self) -> None:
        self.become("cancel", self.cancelled_state)
        self.epoch += 1
        self.cancel_attempts = 0
        self.is_asked = True
        self.is_due = True

    def release(self) -> None:
        self.become("release", S.AVAILABLE)
        self.is_due = True

    def resume(self) -> None:
        self.become("resume", S.AVAILABLE)
        self._begin_again()

    def reset(self) -> None:
        self.become("reset", S.AVAILABLE)
        self._begin_again()
        self.attempts = self.cancel_attempts = self.errors = 0

    def _begin_again(self) -> None:
        self.is_due, self.is_asked = True, False
        self.align()

    def align(self) -> None:
        """Wait for turns exactly if the consumer now serializes."""
        self.turn_key = self.key if self.consumer.serialize and self.key else None


class Turns(NamedTuple):
    """The tasks whose turn it is, and the last key if others behind it were left out."""

    tasks: list[ExpectedTask]
    served: str


@dataclass
class Expected:
    """All tasks there should be."""

    tasks: dict[int, ExpectedTask] = field(default_factory=dict)
    turns: int = 0

    def of(self, consumer: ExpectedConsumer) -> list[ExpectedTask]:
        return [task for task in self.tasks.values() if task.consumer is consumer]

    def next_in_turn(
        self, consumer: ExpectedConsumer, limit: int, group: int, served: str = ""
    ) -> Turns:
        """Return whose turn it is after the key ``served``, of each key at most ``group``."""
        share = max(1, limit - max(1, limit // 4))
        found = self._look(consumer, served, share, group)
        if served and len(found.tasks) < share and not found.served:
            again = self._look(consumer, "", share - len(found.tasks), group)
            more = [task for task in again.tasks if task not in found.tasks]
            found = Turns(found.tasks + more, again.served)
        return found

    def _look(self, consumer: ExpectedConsumer, after: str, limit: int, group: int) -> Turns:
        if not consumer.serialize:
            return Turns([], "")
        by_key: dict[str, list[ExpectedTask]] = {}
        for task in sorted(self.of(consumer), key=lambda task: task.pk):
            if task.turn_key and task.state in {S.AVAILABLE, S.RUNNING, S.RETRYABLE}:
                by_key.setdefault(task.turn_key, []).append(task)
        heads = (_head(consumer, by_key[key], group) for key in sorted(by_key) if key > after)
        found = list(itertools.chain.from_iterable(heads))[:limit]
        keys = list(dict.fromkeys(task.turn_key or "" for task in found))
        kept = keys[: max(1, limit // group)]
        is_cut_short = len(found) == limit or len(kept) < len(keys)
        tasks = [task for task in found if task.turn_key in kept]
        return Turns(tasks, kept[-1] if is_cut_short else "")

    def claim(
        self,
        consumer: ExpectedConsumer,
        limit: int,
        group: int = 1,
        *,
        chosen: Turns | None = None,
        has_turns: bool = True,
        locked: Collection[ExpectedTask] = (),
    ) -> list[ExpectedTask]:
        """Claim, and return what was leased.

        ``chosen`` were chosen before, ``locked`` are passed over; without ``has_turns``
        another claimer gives the turns.
        """
        given, served = chosen, ""
        for number in itertools.count(1):
            free = self._due_freely(consumer, locked)
            turns: list[ExpectedTask] = []
            # A single place is offered to what needs no turn every other time.
            if consumer.serialize and limit == 1 and number % 2 and free:
                due = free[:1]
            else:
                if given is None and has_turns:
                    given = self.next_in_turn(consumer, limit, group, served)
                turns, served = given or Turns([], "")
                due = [task for task in turns if task.is_claimable and task not in locked]
                others = [task for task in free if task not in turns]
                due += others[: limit - len(turns)]
            self._lease(due, turns)
            leased = [task for task in due if task.state in LEASED]
            if leased or not due:
                return leased
            given = None
        raise AssertionError

    def _lease(self, due: list[ExpectedTask], chosen: list[ExpectedTask]) -> None:
        self.turns += 1
        for task in due:
            task.claim(self.turns if task in chosen else 0)

    def _due_freely(
        self, consumer: ExpectedConsumer, locked: Collection[ExpectedTask]
    ) -> list[ExpectedTask]:
        due = [
            task
            for task in self.of(consumer)
            if task.is_claimable
            and task not in locked
            and (task.turn_key is None or task.state == S.CANCELLING)
        ]
        return sorted(due, key=lambda task: (task.schedule_at, task.pk))

    def operate(
        self, verb: str, tasks: Iterable[ExpectedTask], *, running: bool = False
    ) -> tuple[list[UUID], list[UUID], list[UUID]]:
        """Apply an operator's verb; return the event ids of its outcome, sorted."""
        told: tuple[list[UUID], list[UUID], list[UUID]] = ([], [], [])
        for task in tasks:
            if task.state in OPERATED[verb].sources:
                getattr(task, verb)()
                told[0].append(task.event_id)
            elif running and task.state == S.RUNNING and not task.is_asked:
                task.is_asked = True
                told[1].append(task.event_id)
            else:
                told[2].append(task.event_id)
        return sorted(told[0]), sorted(told[1]), sorted(told[2])


def _head(consumer: ExpectedConsumer, tasks: list[ExpectedTask], group: int) -> list[ExpectedTask]:
    """Return the first tasks of a key that may run now."""
    if any(task.state == S.RUNNING and not task.is_due for task in tasks):
        return []
    is_strict = consumer.serialize == "strict"
    queue = [task for task in tasks if task.is_due or (is_strict and task.state == S.RETRYABLE)]
    queue.sort(key=lambda task: (task.state != S.RUNNING, task.pk))  # first what lost its lease
    ready = list(itertools.takewhile(lambda task: task.is_due, queue[:group]))
    if is_strict:  # what failed before may fail again: it is a group of its own
        fresh = list(itertools.takewhile(lambda task: not task.attempts, ready))
        return fresh or ready[:1]
    return ready
