"""Random lives of tasks between two actors, each step checked against a plain model of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.delivery import lease
from tests.races import verbs
from tests.races.actors import Actor, InterruptedConsumer, two_actors
from tests.races.concurrent import Concurrent
from tests.races.life import CONSUMERS, HOUR
from tests.races.steps import LATER, Given, Steps

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = lease.AT_ONCE
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
BEFORE_CLAIM = st.sampled_from(["due", "nothing", *verbs.OPERATIONS])
AFTER_CHOOSING = st.sampled_from(["due and claim", "nack", "claim", "cancel", "resume"])
BEFORE_COMMIT = st.sampled_from(["cancel running", "claim", "nothing", "cancel"])


class TaskLife(Steps):
    """The rules: hypothesis draws which comes next, and with what."""

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
        if before in verbs.OPERATIONS:
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
            return InterruptedConsumer(verbs.stored(consumer, group), interrupt).claim(limit)

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
        first.do(lambda: verbs.end(hand, verdict, delay, meanwhile))
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
        held = {hand.message.lease: HOUR}
        (row,) = self._actor(who).do(lambda: lease.renew(held, "default")).values()
        ran_out = hand.task.turn_key and hand.task.state == TaskState.RUNNING and hand.task.is_due
        is_held = hand.is_live and not ran_out
        assert row.is_renewed == row.is_ours == is_held
        if is_held:
            hand.task.is_due = False

    # What operators and deployments do

    @rule(operation=st.sampled_from(verbs.OPERATIONS), picks=PICKS, who=NUMBER)
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
    live(actors, lives=25, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tasks_live_as_expected_for_long(actors: tuple[Actor, Actor]):
    live(actors, lives=1_000, steps=60)
