"""``kanthorq tasks cancel``, ``resume``, ``release``, ``reset``: told id by id."""

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

from django.core.management.base import CommandError
from django.db.models import Q

from kanthorq_django.domain import states
from kanthorq_django.domain.amounts import counted
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import TaskState
from kanthorq_django.management.lists import JsonLists
from kanthorq_django.management.verbs.tasks.absence import reasons
from kanthorq_django.management.verbs.tasks.selection import Selection, add_filters, selection_of
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Task
from kanthorq_django.models.audit import Order
from kanthorq_django.models.batch import counts_of, move_batch, word_for
from kanthorq_django.models.isolation import together, undeadlocked
from kanthorq_django.models.task import TaskQuerySet

BATCH = 1_000  # tasks that one transaction moves
NOOP = "noop"
NOBODY = "-"  # in place of the consumer of an event that has no such task
DRY_WORDS = {"updated": "would-update", "requested": "would-request", NOOP: NOOP}


class Line(NamedTuple):
    """What became of one task."""

    outcome: str  # updated, requested or noop, as the fields of Outcome
    event: UUID
    consumer: str


class Moving(Verb):
    """What the four verbs share; ``name`` is the queryset's method."""

    changes = True
    name: ClassVar[str]

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--all", action="store_true", help="without any filter; needs --yes")
        parser.add_argument("--dry-run", action="store_true", help="only tell what would happen")
        parser.add_argument("--yes", action="store_true", help="do not ask")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        add_filters(parser, limit=None)

    def run(
        self,
        *,
        all: bool,  # noqa: A002  # the option's name
        dry_run: bool,
        yes: bool,
        json: bool,
        running: bool = False,
        **options: Any,
    ) -> None:
        selection = selection_of(options)
        if not selection and not (all and (yes or dry_run)):
            raise CommandError("Say which tasks: add a filter, or --all together with --yes.")
        tasks, movable = selection.tasks(self.database), self._movable(running=running)
        if selection.limit is not None:
            # What is moved already would use the limit up, and a repeated call never go on.
            tasks = tasks.filter(movable)
        if not (yes or dry_run or self._ask(tasks.filter(movable), selection.limit)):
            # What becomes movable from now on is not what anybody was asked about.
            tasks = tasks.exclude(movable)
        lines = self._lines(tasks, selection, running=running, is_dry=dry_run)
        if json:
            self._print_json(lines, is_dry=dry_run)
        else:
            self._print(lines, is_dry=dry_run)

    def move(self, tasks: TaskQuerySet, *, running: bool) -> Outcome:
        """Apply the verb; ``running`` is for cancel alone."""
        raise NotImplementedError

    def _movable(self, *, running: bool) -> Q:
        """Return which tasks the verb would move, or ask to stop."""
        movable = Q(state__in=states.sources(self.name))
        askable = Q(state=TaskState.RUNNING, cancel_requested_at=None)
        return movable | askable if running else movable

    def _ask(self, tasks: TaskQuerySet, limit: int | None) -> bool:
        """Tell whether there are any to ask about. Raises CommandError unless the answer is yes."""
        self.console.require_answers()
        count = tasks[:limit].count()
        if count:
            self.console.confirm(f"{self.name.capitalize()} {counted(count, 'task')}?")
        return count > 0

    def _lines(
        self, tasks: TaskQuerySet, selection: Selection, *, running: bool, is_dry: bool
    ) -> Iterator[Line]:
        """Yield what became of each task, batch by batch, so that locks are held shortly."""
        order = self.order(**selection.told(), running=running)
        act = self._predict if is_dry else partial(self._move, selected=tasks, order=order)
        unmet, count = dict.fromkeys(selection.events), 0
        for batch in _batches(tasks, selection.limit):
            for line in act(batch, running=running):
                unmet.pop(line.event, None)
                count += 1
                yield line
        if selection.limit is None or count < selection.limit:
            yield from (Line(NOOP, event, NOBODY) for event in unmet)
            for reason in reasons(list(unmet), self.database):
                self.console.note(reason)

    def _move(
        self, batch: list[Task], *, running: bool, selected: TaskQuerySet, order: Order
    ) -> Iterator[Line]:
        """Move what the verb can move; of the rest its state, as it was read, tells enough."""
        movable = [task.pk for task in batch if word_for(self.name, task, running=running) != NOOP]
        words: dict[int, str] = {}
        if movable:
            move = partial(self._move_recorded, selected, movable, order, len(batch), running)
            words = undeadlocked(self.database, move)
        for task in batch:
            yield Line(words.get(task.pk, NOOP), task.event_id, task.consumer.name)

    def _move_recorded(
        self, selected: TaskQuerySet, pks: list[int], order: Order, size: int, running: bool
    ) -> dict[int, str]:
        """Move the tasks and record it, in one transaction; ``size`` is that of the batch."""
        move = partial(self.move, running=running)
        with together(self.database):
            told = move_batch(self.name, move, selected, pks, running=running)
            counts = counts_of(word for _, word in told)
            counts[NOOP] += size - len(told)
            changed = (task.event_id for task, word in told if word != NOOP)
            order.record(f"tasks.{self.name}", using=self.database, counts=counts, ids=changed)
        return {task.pk: word for task, word in told}

    def _predict(self, batch: list[Task], *, running: bool) -> Iterator[Line]:
        for task in batch:
            word = word_for(self.name, task, running=running)
            yield Line(word, task.event_id, task.consumer.name)

    def _print(self, lines: Iterable[Line], *, is_dry: bool) -> None:
        counts = dict.fromkeys(DRY_WORDS, 0)
        for line in lines:
            counts[line.outcome] += 1
            word = DRY_WORDS[line.outcome] if is_dry else line.outcome
            self.console.line(f"{word:<13} {line.event}  {line.consumer}")
        told = ", ".join(f"{count:,} {word}" for word, count in counts.items())
        self.console.note(f"{'Dry run, nothing was changed: ' if is_dry else ''}{told}.")

    def _print_json(self, lines: Iterable[Line], *, is_dry: bool) -> None:
        """Print one object, also when a later batch fails: those before it are done."""
        with JsonLists(DRY_WORDS) as told:
            try:
                for line in lines:
                    told.append(line.outcome, {"event": line.event, "consumer": line.consumer})
            finally:
                self.console.pieces(told.printed(verb=self.name, dry_run=is_dry))


class Cancel(Moving):
    name = "cancel"
    help = "Cancel tasks that wait; with --running also ask those that run to stop."
    description = (
        "Moves pending, available and retryable tasks. A consumer with a cancellation handler\n"
        "gets to run it. Prints each event id as updated, requested (it runs, and was asked to\n"
        "stop) or noop (left as it was)."
    )
    examples = (
        "tasks cancel --consumer refunds --resource-key order-17 --yes",
        "tasks cancel --subject order.paid --running --dry-run",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--running", action="store_true", help="ask running tasks to stop")
        super().add_arguments(parser)

    def move(self, tasks: TaskQuerySet, *, running: bool) -> Outcome:
        return tasks.cancel(running=running)


class Resume(Moving):
    name = "resume"
    help = "Let cancelled and discarded tasks run again; their history is kept."
    description = (
        "At least one more attempt is always allowed. Prints each event id as updated or noop\n"
        "(left as it was)."
    )
    examples = ("tasks resume --consumer refunds --state discarded --yes",)

    def move(self, tasks: TaskQuerySet, *, running: bool) -> Outcome:
        return tasks.resume()


class Release(Moving):
    name = "release"
    help = "Let pending tasks run: those that their consumer parks."
    description = "Prints each event id as updated or noop (left as it was)."
    examples = ("tasks release --consumer payouts --state pending --limit 10 --yes",)

    def move(self, tasks: TaskQuerySet, *, running: bool) -> Outcome:
        return tasks.release()


class Reset(Moving):
    name = "reset"
    help = "Let final tasks run again as if they never had, completed ones too."
    description = (
        "Attempts, errors, results and cancellation requests are forgotten. Prints each event id\n"
        "as updated or noop (left as it was)."
    )
    examples = ("tasks reset --consumer search-index --state completed --dry-run",)

    def move(self, tasks: TaskQuerySet, *, running: bool) -> Outcome:
        return tasks.reset()


def _batches(tasks: TaskQuerySet, limit: int | None) -> Iterator[list[Task]]:
    """Yield the tasks in the order of their ids; each batch is looked up after the one before."""
    left, after = limit, 0
    chosen = tasks.select_related("consumer").only(
        "event_id", "consumer__name", "state", "cancel_requested_at"
    )
    while left is None or left > 0:
        size = BATCH if left is None else min(left, BATCH)
        batch = list(chosen.filter(pk__gt=after)[:size])
        if not batch:
            return
        yield batch
        after = batch[-1].pk
        left = None if left is None else left - len(batch)
