"""Random lives of tasks between two actors, each step checked against a plain model of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import transaction
from django.db.models.functions import Now
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import FINAL, LEASED, TaskState
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.models import Consumer, Event, Task, lease
from tests.clock import now
from tests.races.actors import Actor, InterruptedConsumer, two_actors
from tests.races.expected import OPERATED, ExpectedConsumer, ExpectedTask
from tests.races.life import CONSUMERS, HOUR, Hand, Life

pytestmark = pytest.mark.django_db(transaction=True)

Given = tuple[str, str, bool]  # subject, resource key, whether it is scheduled

AT_ONCE, LATER = lease.AT_ONCE, HOUR
TOGETHER = [
    ("careful", "turns"),
    ("turns",),
    ("careful",),
    ("plain", "strict"),
    ("turns", "parked"),
]
KEYS = st.sampled_from(["", "a", "a", "b"])
SUBJECTS = st.sampled_from(["order.paid", "order.paid", "order.gone", "stock"])
EVENTS_MAX = 12  # few tasks meet more often
EVENT = st.tuples(SUBJECTS, KEYS, st.sampled_from([False, False, True]))
EVENTS, SOME_EVENTS = st.lists(EVENT, max_size=4), st.lists(EVENT, min_size=3, max_size=5)
PICKS = st.lists(st.integers(0, 9), max_size=3)  # of the tasks there are; none picks all
NUMBER = st.integers(0, 9)
LIMIT = st.sampled_from([1, 2, 3, 100])
VERDICTS = st.sampled_from(["nack", "ack", "hand_back"])
DELAYS = st.sampled_from([AT_ONCE, LATER])
OPERATIONS = ["cancel", "cancel running", "release", "resume", "reset"]
BEFORE_CLAIM = st.sampled_from(["due", "nothing", *OPERATIONS])
AFTER_CHOOSING = st.sampled_from(["due and claim", "nack", "claim", "cancel", "resume"])
BEFORE_COMMIT = st.sampled_from(["cancel running", "claim", "nothing", "cancel"])


class TaskLife(RuleBasedStateMachine):
    """Every rule takes one step in the database and one in the model."""

    def __init__(self, actors: tuple[Actor, Actor]) -> None:
        super().__init__()
        self.actors = actors
        self.life = Life()

    @initialize(
        names=st.sampled_from(TOGETHER),
        events=SOME_EVENTS,
    )
    def begin(self, names: tuple[str, ...], events: list[Given]) -> None:
        self.life.begin(names)
        self._publish(events)
        self._pull_all(self.actors[0])

    # Publishing and pulling

    @precondition(lambda self: len(self.life.events) < EVENTS_MAX)
    @rule(
        events=SOME_EVENTS,
        late=EVENTS,
        fate=st.sampled_from(["commit", "overtaken", "roll back"]),
        is_pulled=st.booleans(),
    )
    def publish(self, events: list[Given], late: list[Given], fate: str, is_pulled: bool) -> None:
        first, second = self.actors

        def overtake() -> None:
            second.do(lambda: self._publish(late))
            self._pull_all(second)

        def fail() -> None:
            raise RuntimeError

        ends: dict[str, Callable[[], object]] = {
            "commit": bool,
            "overtaken": overtake,
            "roll back": fail,
        }
        with pytest.raises(RuntimeError) if fate == "roll back" else nullcontext():
            first.do(lambda: self._publish(events, ends[fate]))
        if is_pulled:
            self._pull_all(first)

    @rule(which=NUMBER, limit=LIMIT, who=NUMBER)
    def pull(self, which: int, limit: int, who: int) -> None:
        self.life.pull(self._consumer(which), limit, self._actor(who))

    # Claiming

    @rule(
        before=BEFORE_CLAIM,
        picks=PICKS,
        which=NUMBER,
        limit=LIMIT,
        group=st.integers(1, 2),
        who=NUMBER,
    )
    def claim(
        self, before: str, picks: list[int], which: int, limit: int, group: int, who: int
    ) -> None:
        """Leases change hands, retries and cancellations begin."""
        if before in OPERATIONS:
            self._operate(before, self._actor(who), self._picked(picks))
        if before != "nothing":
            self._come_due(self._picked(picks))
        self.life.check()
        self._claim(self._consumer(which), limit, group, self._actor(who))

    @rule(
        which=NUMBER,
        limit=LIMIT.map(lambda limit: limit + 1),
        group=st.integers(1, 2),
        step=AFTER_CHOOSING,
        picks=PICKS,
    )
    def claim_with_a_step_after_choosing(
        self, which: int, limit: int, group: int, step: str, picks: list[int]
    ) -> None:
        first, second = self.actors
        consumer, expected = self._consumer(which), self.life.expected
        chosen = expected.next_in_turn(consumer, limit, group)

        def interrupt() -> None:
            self._step(step, second, consumer, self._picked(picks), has_turns=False)

        def claim() -> list[Any]:
            return InterruptedConsumer(_stored(consumer, group), interrupt).claim(limit)

        tasks = first.do(claim)
        self.life.claimed(tasks, expected.claim(consumer, limit, group, chosen=chosen))

    # Ending leases

    @precondition(lambda self: self.life.hands)
    @rule(which=NUMBER, verdicts=st.lists(VERDICTS, min_size=1, max_size=4), delay=DELAYS)
    def end(self, which: int, verdicts: list[str], delay: timedelta) -> None:
        """End leases as their holders do, who do not know whether they are over."""
        first = which % len(self.life.hands)
        ends = [*self.life.hands[first:], *self.life.hands[:first]]
        for number, (hand, verdict) in enumerate(zip(ends, verdicts, strict=False)):
            self.life.drop([hand])
            self._end(hand, verdict, delay, self._actor(number))

    @precondition(lambda self: self._lost())
    @rule(who=NUMBER)
    def end_what_others_hold(self, who: int) -> None:
        """Whatever the former holder of a task says, nothing of it counts."""
        for hand in self._lost():
            for verdict in ("ack", "nack", "hand_back"):
                self._end(hand, verdict, AT_ONCE, self._actor(who))
        self.life.drop(self._lost())

    @precondition(lambda self: any(hand.is_live for hand in self.life.hands))
    @rule(
        which=NUMBER,
        verdict=VERDICTS,
        delay=DELAYS,
        is_committed=st.booleans(),
        step=BEFORE_COMMIT,
        picks=PICKS,
    )
    def end_while_another_acts(
        self,
        which: int,
        verdict: str,
        delay: timedelta,
        is_committed: bool,
        step: str,
        picks: list[int],
    ) -> None:
        """What another does before the commit waits for it, or passes the task over."""
        live = [hand for hand in self.life.hands if hand.is_live]
        hand = live[which % len(live)]
        tasks = sorted({*self._picked(picks), hand.task}, key=lambda task: task.pk)
        concurrent = Concurrent(self.life, step, hand.task, tasks)
        first, second = self.actors

        def meanwhile() -> bool:
            concurrent.future = second.start_until_blocked(concurrent.work)
            return is_committed

        concurrent.foresee_claims()
        first.do(lambda: _end(hand, verdict, delay, meanwhile))
        if is_committed:
            self.life.drop([hand])
            self._expect_end(hand, verdict, delay)
        concurrent.settle()

    @precondition(lambda self: self.life.hands)
    @rule(picks=PICKS, who=NUMBER)
    def ack_together(self, picks: list[int], who: int) -> None:
        """As implicit acks are written: the stale ones among them change nothing."""
        numbers = {pick % len(self.life.hands) for pick in picks}
        self._ack([self.life.hands[number] for number in sorted(numbers)], self._actor(who))

    def _ack(self, held: list[Hand], actor: Actor) -> None:
        live = [hand for hand in held if hand.is_live]

        def ack() -> set[int]:
            with transaction.atomic():
                acked = lease.ack({hand.message.lease: "1" for hand in held}, "default")
                for hand in live:
                    hand.write_effect()
            return acked

        assert actor.do(ack) == {hand.task.pk for hand in live}
        for hand in live:
            hand.task.ack()
        self.life.effects += [hand.note for hand in live]
        self.life.drop(held)

    @precondition(lambda self: len(self.life.hands) > 2)
    @rule(which=NUMBER)
    def crash(self, which: int) -> None:
        """A worker dies with its lease; nothing is written."""
        self.life.drop([self._hand(which)])

    @precondition(lambda self: self.life.hands)
    @rule(which=NUMBER, who=NUMBER, is_late=st.booleans())
    def renew(self, which: int, who: int, is_late: bool) -> None:
        hand = self._hand(which)
        if is_late:
            self._come_due([hand.task])
        (row,) = self._actor(who).do(lambda: lease.renew({hand.message.lease: HOUR}, "default"))
        ran_out = hand.task.turn_key and hand.task.state == TaskState.RUNNING and hand.task.is_due
        is_held = hand.is_live and not ran_out
        assert row.is_renewed == row.is_ours == is_held
        if is_held:
            hand.task.is_due = False

    # What operators and deployments do

    @rule(operation=st.sampled_from(OPERATIONS), picks=PICKS, who=NUMBER)
    def operate(self, operation: str, picks: list[int], who: int) -> None:
        self._operate(operation, self._actor(who), self._picked(picks))

    @rule(which=NUMBER, has_handler=st.booleans(), serialize=st.sampled_from(["", "on", "strict"]))
    def redeclare(self, which: int, has_handler: bool, serialize: str) -> None:
        name = self._consumer(which).name
        given = CONSUMERS[name]._replace(has_cancel_handler=has_handler, serialize=serialize)
        self.life.register(name, given)

    # What must always hold

    @invariant()
    def rows_are_as_expected(self) -> None:
        self.life.check()

    def teardown(self) -> None:
        """In the end every committed event has its task, and every task can be ended."""
        if self.life.consumers and sys.exc_info()[0] is None:
            self._pull_all(self.actors[1])
            self._end_all()
            self.life.check()

    def _end_all(self) -> None:
        for _ in range(100):
            open_ = [t for t in self.life.expected.tasks.values() if t.state not in FINAL]
            if not open_:
                return
            self._operate("release", self.actors[0], open_)
            self._come_due(open_)
            self.life.check()
            for number in range(len(self.life.consumers)):
                self._claim(self._consumer(number), 100, 1, self._actor(number))
            self._ack(self.life.hands, self.actors[0])
            self.life.check()
        raise AssertionError("tasks are stranded")

    # Steps

    def _publish(self, given: list[Given], meanwhile: Callable[[], object] = bool) -> None:
        events = [
            Event(subject=subject, resource_key=key, schedule_at=now() + HOUR if later else None)
            for subject, key, later in given
        ]
        self.life.publish(events, meanwhile)

    def _claim(self, consumer: ExpectedConsumer, limit: int, group: int, actor: Actor) -> None:
        tasks = actor.do(lambda: _stored(consumer, group).claim(limit))
        self.life.claimed(tasks, self.life.expected.claim(consumer, limit, group))

    def _pull_all(self, actor: Actor) -> None:
        for consumer in self.life.consumers.values():
            while self.life.pull(consumer, 100, actor):
                pass

    def _step(
        self,
        step: str,
        actor: Actor,
        consumer: ExpectedConsumer,
        tasks: list[ExpectedTask],
        *,
        has_turns: bool,
    ) -> None:
        if step in {"due and claim", "nack"}:
            actor.do(partial(self._come_due, tasks))
        if "claim" in step:
            self._refresh_order()
            claimed = actor.do(lambda: _stored(consumer, 1).claim(100))
            has_turns = has_turns or not consumer.serialize
            wanted = self.life.expected.claim(consumer, 100, has_turns=has_turns)
            self.life.claimed(claimed, wanted)
        elif step == "nack":
            self._nack_all(actor, tasks)
        else:
            self._operate(step, actor, tasks)
        self._refresh_order()

    def _nack_all(self, actor: Actor, tasks: list[ExpectedTask]) -> None:
        for hand in [hand for hand in self.life.hands if hand.is_live and hand.task in tasks]:
            self._end(hand, "nack", LATER, actor)
            self.life.drop([hand])

    def _refresh_order(self) -> None:
        for pk, moment in Task.objects.values_list("pk", "schedule_at"):
            self.life.expected.tasks[pk].schedule_at = moment

    def _come_due(self, tasks: list[ExpectedTask]) -> None:
        waiting = [task for task in tasks if task.state not in FINAL]
        Task.objects.filter(pk__in=[task.pk for task in waiting]).update(schedule_at=Now() - HOUR)
        for task in waiting:
            task.is_due = True

    def _operate(self, operation: str, actor: Actor, tasks: list[ExpectedTask]) -> None:
        outcome = actor.do(partial(_operate, operation, tasks))
        verb, running = _verb(operation)
        assert _told(outcome) == self.life.expected.operate(verb, tasks, running=running)

    def _end(self, hand: Hand, verdict: str, delay: timedelta, actor: Actor) -> None:
        if hand.is_live:
            actor.do(lambda: _end(hand, verdict, delay, lambda: True))
            self._expect_end(hand, verdict, delay)
            return
        with pytest.raises(LeaseLost):
            actor.do(lambda: _end(hand, verdict, delay, lambda: True))

    def _expect_end(self, hand: Hand, verdict: str, delay: timedelta) -> None:
        if verdict == "ack":
            hand.task.ack()
            self.life.effects.append(hand.note)
        else:
            getattr(hand.task, verdict)(is_delayed=delay == LATER)

    def _lost(self) -> list[Hand]:
        """Return leases that are over while another one of the same task is not."""
        held = [hand for hand in self.life.hands if hand.task.state in LEASED]
        return [hand for hand in held if not hand.is_live]

    def _hand(self, number: int) -> Hand:
        return self.life.hands[number % len(self.life.hands)]

    def _actor(self, number: int) -> Actor:
        return self.actors[number % 2]

    def _consumer(self, number: int) -> ExpectedConsumer:
        consumers = list(self.life.consumers.values())
        return consumers[number % len(consumers)]

    def _picked(self, picks: list[int]) -> list[ExpectedTask]:
        tasks = [task for _, task in sorted(self.life.expected.tasks.items())]
        if not picks or not tasks:
            return tasks
        return [tasks[number] for number in sorted({pick % len(tasks) for pick in picks})]


class Concurrent:
    """A step of another actor while a transaction that ends ``locked`` is open."""

    def __init__(
        self, life: Life, step: str, locked: ExpectedTask, tasks: list[ExpectedTask]
    ) -> None:
        self.life, self.step, self.locked, self.tasks = life, step, locked, tasks
        self.was = locked.state
        self.future: Any = None
        self.claimed: list[ExpectedTask] = []

    def work(self) -> Any:
        if self.step == "nothing":
            return None
        if "claim" in self.step:
            return _stored(self.locked.consumer, 1).claim(100)
        return _operate(self.step, self.tasks)

    def foresee_claims(self) -> None:
        if "claim" in self.step:
            self.claimed = self.life.expected.claim(self.locked.consumer, 100, locked=[self.locked])

    def settle(self) -> None:
        """Wait for its end; expect of it what was possible before and after the commit."""
        result = self.future.result(30)
        if "claim" in self.step:
            self.life.claimed(result, self.claimed)
        elif self.step != "nothing":
            self._settle_verb(result)

    def _settle_verb(self, outcome: Outcome) -> None:
        verb, running = _verb(self.step)
        seen = OPERATED[verb].sources | ({TaskState.RUNNING} if running else set())
        tasks = [task for task in self.tasks if task is not self.locked or self.was in seen]
        updated, requested, noop = self.life.expected.operate(verb, tasks, running=running)
        noop += [task.event_id for task in self.tasks if task not in tasks]
        assert _told(outcome) == (updated, requested, sorted(noop))


def _end(hand: Hand, verdict: str, delay: timedelta, meanwhile: Callable[[], bool]) -> None:
    """End a lease in a transaction, with an effect if it is an ack; ``meanwhile`` says commit."""
    with transaction.atomic():
        if verdict == "ack":
            hand.write_effect()
            hand.message.ack({"epoch": hand.message.lease_epoch})
        elif verdict == "nack":
            hand.message.nack("failed", delay=delay)
        elif not lease.hand_back([hand.message.lease], "default", delay=delay):
            raise hand.message.lost()
        if not meanwhile():
            transaction.set_rollback(True)


def _operate(operation: str, tasks: list[ExpectedTask]) -> Outcome:
    verb, running = _verb(operation)
    found = Task.objects.filter(pk__in=[task.pk for task in tasks])
    outcome: Outcome = getattr(found, verb)(**({"running": True} if running else {}))
    return outcome


def _verb(operation: str) -> tuple[str, bool]:
    return operation.removesuffix(" running"), operation.endswith(" running")


def _told(outcome: Outcome) -> tuple[list[Any], list[Any], list[Any]]:
    return sorted(outcome.updated), sorted(outcome.requested), sorted(outcome.noop)


def _stored(consumer: ExpectedConsumer, group: int) -> Consumer:
    stored = Consumer.objects.get(pk=consumer.pk)
    stored.group_size = group
    return stored


@pytest.fixture
def actors(transactional_db: None) -> Iterator[tuple[Actor, Actor]]:
    with two_actors() as both:
        yield both


def live(actors: tuple[Actor, Actor], *, lives: int, steps: int) -> None:
    """Let that many random lives go by, and fail with the shortest that went wrong."""
    given = settings(
        deadline=None,
        max_examples=lives,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    machine: Any = partial(TaskLife, actors)
    run_state_machine_as_test(machine, settings=given)


def test_tasks_live_as_expected_whatever_happens_to_them(actors: tuple[Actor, Actor]):
    live(actors, lives=40, steps=30)


@pytest.mark.slow
def test_tasks_live_as_expected_for_long(actors: tuple[Actor, Actor]):
    live(actors, lives=1_000, steps=60)
