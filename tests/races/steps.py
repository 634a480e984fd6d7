"""The steps that rules are made of: each is taken in the database and in the model of it."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
from django.db import transaction
from django.db.models.functions import Now
from hypothesis.stateful import RuleBasedStateMachine

from kanthorq_django.domain.states import FINAL, LEASED
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.models import Event, Task
from kanthorq_django.models.delivery import lease
from tests.clock import now
from tests.races import verbs
from tests.races.actors import Actor
from tests.races.expected import ExpectedConsumer, ExpectedTask
from tests.races.life import HOUR, Hand, Life

Given = tuple[str, str, bool]  # subject, resource key, whether it is scheduled

LATER = HOUR


class Steps(RuleBasedStateMachine):
    """Two actors, the life of tasks between them, and whatever one of them may do next."""

    def __init__(self, actors: tuple[Actor, Actor]) -> None:
        super().__init__()
        self.actors = actors
        self.life = Life()

    # Publishing, pulling, claiming

    def _publish(self, given: list[Given], meanwhile: Callable[[], object] = bool) -> None:
        events = [
            Event(subject=subject, resource_key=key, schedule_at=now() + HOUR if later else None)
            for subject, key, later in given
        ]
        self.life.publish(events, meanwhile)

    def _pull_all(self, actor: Actor) -> None:
        for consumer in self.life.consumers.values():
            while self.life.pull(consumer, 100, actor):
                pass

    def _claim(self, consumer: ExpectedConsumer, limit: int, group: int, actor: Actor) -> None:
        tasks = actor.do(lambda: verbs.stored(consumer, group).claim(limit))
        self.life.claimed(tasks, self.life.expected.claim(consumer, limit, group))

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
            claimed = actor.do(lambda: verbs.stored(consumer, 1).claim(100))
            has_turns = has_turns or not consumer.serialize
            wanted = self.life.expected.claim(consumer, 100, has_turns=has_turns)
            self.life.claimed(claimed, wanted)
        elif step == "nack":
            self._nack_all(actor, tasks)
        else:
            self._operate(step, actor, tasks)
        self._refresh_order()

    # Ending leases

    def _end(self, hand: Hand, verdict: str, delay: timedelta, actor: Actor) -> None:
        if hand.is_live:
            actor.do(lambda: verbs.end(hand, verdict, delay, lambda: True))
            self._expect_end(hand, verdict, delay)
            return
        with pytest.raises(LeaseLost):
            actor.do(lambda: verbs.end(hand, verdict, delay, lambda: True))

    def _expect_end(self, hand: Hand, verdict: str, delay: timedelta) -> None:
        if verdict == "ack":
            hand.task.ack()
            self.life.effects.append(hand.note)
        else:
            getattr(hand.task, verdict)(is_delayed=delay == LATER)

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

    def _nack_all(self, actor: Actor, tasks: list[ExpectedTask]) -> None:
        for hand in [hand for hand in self.life.hands if hand.is_live and hand.task in tasks]:
            self._end(hand, "nack", LATER, actor)
            self.life.drop([hand])

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

    # Operators and the clock

    def _operate(self, operation: str, actor: Actor, tasks: list[ExpectedTask]) -> None:
        outcome = actor.do(partial(verbs.operate, operation, tasks))
        verb, running = verbs.verb_of(operation)
        assert verbs.told(outcome) == self.life.expected.operate(verb, tasks, running=running)

    def _come_due(self, tasks: list[ExpectedTask]) -> None:
        waiting = [task for task in tasks if task.state not in FINAL]
        Task.objects.filter(pk__in=[task.pk for task in waiting]).update(schedule_at=Now() - HOUR)
        for task in waiting:
            task.is_due = True

    def _refresh_order(self) -> None:
        for pk, moment in Task.objects.values_list("pk", "schedule_at"):
            self.life.expected.tasks[pk].schedule_at = moment

    # Who and what is meant

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
