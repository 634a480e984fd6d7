"""Decides whose tasks are fetched next: one look for all consumers, then pulls and claims."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from django.db import Error, connections

from kanthorq_django.exceptions import PullRefused
from kanthorq_django.models import Consumer
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.cursor import peek
from kanthorq_django.models.delivery.leased import Leased
from kanthorq_django.worker.connections.database_errors import is_out_of_memory, is_unavailable
from kanthorq_django.worker.connections.upkeep import leave_connections
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.pulling.answer_size import AnswerSize
from kanthorq_django.worker.pulling.demand import Demand, Wanted
from kanthorq_django.worker.pulling.filter_watch import FilterWatch
from kanthorq_django.worker.pulling.floors import Floors
from kanthorq_django.worker.pulling.pause import PAUSE_LONGEST, Pause
from kanthorq_django.worker.pulling.turn_watch import TurnWatch
from kanthorq_django.worker.warden import Bounded

MICROSECONDS = 1_000_000  # of a second
LOOK_EVERY = 0.1  # seconds at most that guesses stand for looks
GUESSES_MAX = 3  # consumers that pull without a look
MOMENT = 0.001  # seconds: what was to be waited for is over, but for the look that finds it

_FILTERS = ("subject_includes", "subject_excludes")


class Look(NamedTuple):
    """What a look found for one consumer; ``due_in`` is seconds, None when no task waits."""

    has_events: bool
    due_in: float | None
    is_guess: bool = False  # nobody looked

    @property
    def has_work(self) -> bool:
        return self.has_events or self.is_due

    @property
    def is_due(self) -> bool:
        return self.due_in is not None and self.due_in <= 0


class Haul(NamedTuple):
    """What one step leased; ``asked_at`` was read before, so no lease began earlier."""

    leased: list[Leased]
    asked_at: float
    is_claim: bool


class _Step(NamedTuple):
    """One statement that leases; it returns None when there was nothing to be had."""

    lease: Callable[[Consumer, Wanted], list[Leased] | None]
    demand: Callable[[], Wanted]
    is_claim: bool


class Puller:
    """Fetches leased tasks for the consumers of one worker, in turn, so that none starves."""

    def __init__(
        self, consumers: list[Consumer], options: WorkerOptions, using: str, bounded: Bounded
    ) -> None:
        self._consumers = {consumer.pk: consumer for consumer in consumers}
        self._options = options
        self._using = using
        self._bounded = bounded
        # Whoever was served last comes last. What leased nothing for want of room was not served.
        self._order = list(self._consumers)
        self._has_claimed = dict.fromkeys(self._consumers, False)  # and not pulled, the last time
        self._floors = Floors(self._consumers)
        self._answer_size = AnswerSize()
        # The last pull found all that there was room for; all since the last look found less, and
        # leased it.
        self._has_more = self._has_all = False
        self._has_due = False  # as far as the last look saw
        self._looked_at = -math.inf
        self._guessing_since = math.inf  # without a look
        self._refusals: dict[int, PullRefused] = {}
        self.filters = FilterWatch(consumers)
        longest = min(PAUSE_LONGEST, options.poll_interval.total_seconds())
        self._pauses = {consumer.pk: Pause(consumer, longest) for consumer in consumers}
        self._turns = TurnWatch(self._consumers, longest, is_patient=not options.burst)

    @property
    def refusals(self) -> list[PullRefused]:
        """Why consumers are not read at present."""
        return list(self._refusals.values())

    def resume(self, name: str) -> None:
        """Look at once for turns of a consumer that serializes: a key of it has become free."""
        for consumer in list(self._consumers.values()):  # another thread's, which may forget one
            if consumer.name == name:
                self._turns.note_freed(consumer.pk)
                self._pauses[consumer.pk].relent()

    def look(self, *, is_quiet: bool) -> dict[int, Look]:
        """Return what there is to do for each consumer; one statement that writes nothing.

        ``is_quiet``: this worker held no lease before the look.
        """
        self._turns.is_patient = not (self._options.burst and is_quiet)
        self._looked_at, self._guessing_since = time.monotonic(), math.inf
        floors = self._floors.begin()
        with self._bounded(connections[self._using]):
            rows = peek(
                floors, self._options.claims, self._using, horizon=self._options.poll_interval
            )
        self._floors.learn(rows)
        for pk in self._consumers.keys() - {row.id for row in rows}:
            self._forget(pk)
        looks = {
            row.id: Look(row.has_events and self._may_pull(row.id), self._due_in(row))
            for row in rows
        }
        self._has_due = any(look.is_due for look in looks.values())
        if self._options.burst and not any(look.has_work for look in looks.values()):
            # What ends a burst has to be seen from the beginning.
            return looks if self._floors.forget() else self.look(is_quiet=is_quiet)
        return looks

    def _forget(self, pk: int) -> None:
        """Serve a consumer no more that was deleted, and say so once."""
        consumer = self._consumers.pop(pk)
        self._order.remove(pk)
        logger.error(
            "Consumer %s was deleted. If it was registered again, restart this worker to serve it.",
            consumer.name,
            extra={"consumer": consumer.name},
        )

    def look_for_turns(self, told: Collection[int]) -> None:
        """Ask again for turns of consumers of the streams ``told``, by their ids.

        What happened there may be that somebody resumed a task whose key is free.
        """
        for pk, consumer in self._consumers.items():
            if consumer.stream_id in told:
                self._turns.ask_again(pk)

    def guess(self, told: Collection[int]) -> dict[int, Look]:
        """Return what is known without a look: by notifications of streams ``told`` by their ids.

        Or of a single consumer, as its last pull was full. Empty where nothing is, or where so many
        consumers would have to pull that a look, which takes as long as a pull, may spare more.
        """
        known = [pk for pk, consumer in self._consumers.items() if consumer.stream_id in told]
        if self._has_more and not self._has_due and len(self._consumers) == 1:
            known = list(self._consumers)
        if not (0 < len(known) <= GUESSES_MAX and self._options.pulls):
            return {}
        now = time.monotonic()
        self._guessing_since = min(self._guessing_since, now)
        if now >= self._guessing_since + LOOK_EVERY:
            return {}
        self._has_all = True
        return {pk: Look(has_events=True, due_in=None, is_guess=True) for pk in known}

    def may_pause(self, looks: Mapping[int, Look]) -> bool:
        """Tell whether ``looks`` were a guess that leased fewer events than there was room for."""
        return self._has_all and any(look.is_guess for look in looks.values())

    def _due_in(self, row: Any) -> float | None:
        waits = [] if row.due_at is None else [(row.due_at - row.looked_at) / MICROSECONDS]
        if row.turn_at is not None:
            due_in = (row.turn_at - row.looked_at) / MICROSECONDS
            waits.append(max(due_in, self._turns.seconds_without(row.id)))
        return min((wait for wait in waits if wait < math.inf), default=None)

    def in_turn(self, looks: Mapping[int, Look]) -> Iterator[Consumer]:
        """Yield each consumer that has work, first who has waited longest to be served."""
        for pk in list(self._order):
            look = looks.get(pk)
            if look and look.has_work and not self._pauses[pk].seconds:
                yield self._consumers[pk]

    def _note_served(self, consumer: Consumer, *, is_claim: bool) -> None:
        self._order.remove(consumer.pk)
        self._order.append(consumer.pk)
        self._has_claimed[consumer.pk] = is_claim

    def rest(self, looks: Mapping[int, Look]) -> float:
        """Return in how many seconds known work can be fetched; infinite when there is none."""
        waits = [
            self._left_alone(pk) if look.has_work else look.due_in for pk, look in looks.items()
        ]
        return min((wait for wait in waits if wait), default=math.inf)

    def _left_alone(self, pk: int) -> float:
        """Return for how many seconds nothing is asked of a consumer that had work at the look.

        0 for one that there was no room for: who makes room wakes the worker.
        """
        until, paused = self._turns.none_until(pk), self._pauses[pk].seconds
        if until <= self._looked_at:  # not for want of turns
            return paused
        return max(paused, until - time.monotonic(), MOMENT)

    def fetch(self, consumer: Consumer, look: Look, demand: Demand) -> Iterator[Haul]:
        """Lease what ``demand`` wants: old obligations and new events take turns to come first.

        The tasks of each step are yielded before the next one, which may fail. A consumer is
        left alone for a while when others are at its rows, and when its statements fail.
        Raises django.db.Error when the connection is lost.
        """
        failure: Exception | None = None
        has_tried = has_progressed = is_full = False
        freed_count = self._turns.freed_count
        for step in self._steps(consumer, look, demand):
            wanted = step.demand()
            is_full |= not wanted.limit or (step.is_claim and wanted.states != self._options.claims)
            if not wanted.limit:
                continue
            has_tried = True
            try:
                haul = self._take(step, consumer, wanted)
            except Exception as error:  # noqa: BLE001  # one consumer's defect is not the others'
                self._raise_if_final(error)
                failure, haul = error, None
            if haul is not None:
                has_progressed = True
                yield haul
        has_progressed |= is_full or self._is_explained(consumer, look, freed_count, failure)
        if has_tried:
            self._pauses[consumer.pk].update(failure, has_progressed=has_progressed)

    def _is_explained(
        self, consumer: Consumer, look: Look, freed_count: int, failure: Exception | None
    ) -> bool:
        """Tell whether nothing was had though nobody is at the consumer's rows.

        Others were faster to pull an event, a key became free meanwhile, or all turns are given.
        """
        was_faster = look.is_guess or freed_count != self._turns.freed_count
        return was_faster or (failure is None and self._turns.seconds_without(consumer.pk) > 0)

    def _steps(self, consumer: Consumer, look: Look, demand: Demand) -> Sequence[_Step]:
        due_tasks = functools.partial(demand.of_due_tasks, self._options.claims)
        claim = _Step(self._claim, due_tasks, is_claim=True)
        pull = _Step(self._pull, demand.of_events, is_claim=False)
        steps = [claim] * look.is_due + [pull] * look.has_events
        return steps[::-1] if self._has_claimed[consumer.pk] else steps

    def _take(self, step: _Step, consumer: Consumer, wanted: Wanted) -> Haul | None:
        asked_at = time.monotonic()
        try:
            with self._bounded(connections[self._using]):
                leased = step.lease(consumer, wanted)
        except Exception as error:
            if is_out_of_memory(error):
                self._answer_size.did_not_fit()
            raise
        if leased:
            self._answer_size.fitted()
        leave_connections()  # receivers of signals may have left a block open
        if leased is None:
            return None
        self._note_served(consumer, is_claim=step.is_claim)
        return Haul(leased, asked_at, step.is_claim)

    def _raise_if_final(self, error: Exception) -> None:
        is_final = self._options.burst and not is_unavailable(error)
        if is_final or not connections[self._using].is_usable():
            raise error

    def _claim(self, consumer: Consumer, wanted: Wanted) -> list[Leased] | None:
        freed_count = self._turns.freed_count
        leased = claim_due(
            consumer,
            wanted.limit,
            wanted.states,
            self._floors[consumer.pk],
            self._answer_size.bytes_max,
        )
        self._turns.note_claim(consumer, leased, freed_count)
        if self.filters.is_outside(consumer, leased):
            self._ask_for_filters(consumer)
        return leased or None

    def _ask_for_filters(self, consumer: Consumer) -> None:
        """Ask the row: others have pulled a task, or it has waited since filters were wider."""
        with contextlib.suppress(Error, Consumer.DoesNotExist):  # or what is leased would be lost
            consumer.refresh_from_db(using=self._using, fields=_FILTERS)
            self.filters.note(consumer)

    def _pull(self, consumer: Consumer, wanted: Wanted) -> list[Leased] | None:
        """Return what a page leased, which may be nothing; None when nothing could be read."""
        had_all, self._has_more, self._has_all = self._has_all, False, False
        try:
            page = consumer.pull_page(wanted.limit, self._answer_size.bytes_max)
        except PullRefused as error:
            self._refuse(consumer, error)
            return None
        self._refusals.pop(consumer.pk, None)
        self.filters.note(consumer)
        self._has_more = page.is_full and bool(page.leased)
        # What waits for its turn is not leased by a pull.
        has_all = bool(page.leased) and not page.is_full and not consumer.serialize
        self._has_all = had_all and has_all
        if not page.is_idle:
            self._turns.ask_again(consumer.pk)
        return None if page.is_idle else page.leased

    def _may_pull(self, consumer_id: int) -> bool:
        # A burst does not wait for what is refused; anybody else tries again, as after a failover.
        return self._options.pulls and not (self._options.burst and consumer_id in self._refusals)

    def _refuse(self, consumer: Consumer, reason: PullRefused) -> None:
        """Say once why a consumer is not read."""
        if str(self._refusals.get(consumer.pk)) != str(reason):
            logger.error("%s", reason, extra={"consumer": consumer.name})
        self._refusals[consumer.pk] = reason
