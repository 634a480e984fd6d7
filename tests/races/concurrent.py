"""What another actor does while a transaction that ends a task is open."""

from typing import Any

from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import TaskState
from tests.races import verbs
from tests.races.expected import OPERATED, ExpectedTask
from tests.races.life import Life


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
            return verbs.stored(self.locked.consumer, 1).claim(100)
        return verbs.operate(self.step, self.tasks)

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
        verb, running = verbs.verb_of(self.step)
        seen = OPERATED[verb].sources | ({TaskState.RUNNING} if running else set())
        tasks = [task for task in self.tasks if task is not self.locked or self.was in seen]
        updated, requested, noop = self.life.expected.operate(verb, tasks, running=running)
        noop += [task.event_id for task in self.tasks if task not in tasks]
        assert verbs.told(outcome) == (updated, requested, sorted(noop))
