"""For the tests of projects: run the handlers of what a test has published, in its own thread.

Works inside Django's ``TestCase``, whose transaction never commits, as well as outside of one: see
commits.py.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any
from uuid import UUID

from asgiref.sync import async_to_sync, sync_to_async
from django.db import Error, connections, router
from django.db.models.functions import Now
from django.utils.asyncio import async_unsafe

from kanthorq_django import signals, sql
from kanthorq_django.domain import subjects
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.retry import WAIT_LIMIT
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.domain.verdicts import Verdict
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.models.delivery.leased import Leased, pulled_by, tell_of
from kanthorq_django.subscribers import find, sync
from kanthorq_django.testing.commits import committing
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.endings import (
    Ending,
    HandBack,
    Nack,
    after_error,
    after_interrupt,
    after_return,
    concluded,
)
from kanthorq_django.worker.executor import acall, call
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.lanes.call import Round, calls

BATCH_SIZE = 1_000

_Run = tuple[int, bool]  # of a task by its id: whether by its cancellation handler


@async_unsafe("drain() cannot be called from an async context; use `await adrain(…)`.")
def drain(*consumers: str, raise_errors: bool = False) -> int:
    """Handle all that is due for ``consumers`` (none named: for all); return how many tasks.

    Each counts as often as it was handled, once more for a retry without a delay. Also what
    handlers publish meanwhile. A failing handler is nacked as in a worker, its error stands in
    ``task.attempted_errors``; what waits for a retry is left to wait. So is what snoozed, even if
    it is due again at once, until the next call; later ones of its key pass it.

    With ``raise_errors`` the first error of a handler is raised once its task is nacked; the tasks
    after it are left for the next call. ``Snooze``, ``Retry`` and ``Discard`` are no errors.
    """
    _check_names(consumers)
    using: str = router.db_for_write(Consumer)
    return _Drain(sync(consumers or None, using=using), using, raise_errors=raise_errors).run()


def _check_names(consumers: Iterable[object]) -> None:
    for name in consumers:
        if not isinstance(name, str):
            raise TypeError(f"drain() takes names of consumers one by one, not {quoted(name)}.")


async def adrain(*consumers: str, raise_errors: bool = False) -> int:
    """Do what ``drain()`` does, from a coroutine."""
    return await sync_to_async(drain)(*consumers, raise_errors=raise_errors)


class _Drain:
    """One call of ``drain()``: what it has handled, and what it leaves for the next one."""

    def __init__(self, consumers: Sequence[Consumer], using: str, *, raise_errors: bool) -> None:
        for consumer in consumers:
            consumer.turns.group_size = find(consumer.name).group_size
        self._consumers, self._using, self._raise_errors = consumers, using, raise_errors
        self._acknowledger = Acknowledger(using, written=lambda leases: None, is_patient=False)
        self._handled: dict[int, list[UUID]] = {consumer.pk: [] for consumer in consumers}
        self._snoozed: set[_Run] = set()
        self._postponed: set[int] = set()
        self._unstarted: set[Lease] = set()

    def run(self) -> int:
        try:
            self._work_off()
        except BaseException:
            with contextlib.suppress(Error):  # of a broken transaction, which takes it back as well
                lease.hand_back(list(self._unstarted), self._using)
                self._let_be_due()
            raise
        self._let_be_due()
        return sum(map(len, self._handled.values()))

    def _work_off(self) -> None:
        while due := [
            (consumer, flights)
            for consumer in self._consumers
            if (flights := self._lease_awake(consumer))
        ]:
            for consumer, flights in due:
                self._handle(consumer, flights)

    def _handle(self, consumer: Consumer, flights: Sequence[Flight]) -> None:
        self._handled[consumer.pk] += [flight.leased.event_id for flight in flights]
        for each in calls(flights, find(consumer.name)):
            for round_ in each.rounds:
                self._unstarted.difference_update(flight.lease for flight in round_)
                endings, error = _settled(round_, self._acknowledger)
                self._snoozed |= _snoozed(endings)
                if self._raise_errors:
                    _raise_failure(endings, error)

    def _lease_awake(self, consumer: Consumer) -> list[Flight]:
        """Lease what is due; return what of it has not snoozed."""
        while flights := self._lease_due(consumer):
            awake = [each for each in flights if _run_of(each.message) not in self._snoozed]
            self._postpone({each.lease for each in flights} - {each.lease for each in awake})
            if awake:
                return awake
        return []

    def _postpone(self, leases: Collection[Lease]) -> None:
        """Let what has snoozed, and is due again, be due no more before the end.

        Left due, it would be leased over and over; kept leased, it would keep the turn of its key.
        """
        if leases:
            self._postponed |= lease.hand_back(list(leases), self._using, delay=2 * WAIT_LIMIT)

    def _let_be_due(self) -> None:
        """Let what was postponed be due again, unless somebody has moved it meanwhile."""
        postponed = Task._base_manager.using(self._using).filter(pk__in=self._postponed)
        postponed.filter(schedule_at__gt=Now() + WAIT_LIMIT).update(schedule_at=Now())

    def _lease_due(self, consumer: Consumer) -> list[Flight]:
        leased: list[Task | Leased] = []
        if connections[self._using].in_atomic_block:
            leased += self._pull_uncommitted(consumer)
        else:
            leased += consumer.pull(BATCH_SIZE)
        # Also of what was just pulled and waits for its turn.
        leased += claim_due(consumer, BATCH_SIZE, CLAIMABLE)
        subscription = find(consumer.name)
        flights = [Flight(each, subscription, time.monotonic()) for each in leased]
        self._unstarted.update(flight.lease for flight in flights)
        return flights

    def _pull_uncommitted(self, consumer: Consumer) -> list[Leased]:
        params = {
            # A handler may delete its task, which is all that tells.
            "handled": self._handled[consumer.pk],
            "consumer_id": consumer.pk,
            "includes": subjects.to_regex(consumer.subject_includes),
            "excludes": subjects.to_regex(consumer.subject_excludes),
        }
        leased = pulled_by(consumer, sql.lazy_rows(self._using, "pull_uncommitted", params))
        tell_of(signals.pulled, consumer, leased)
        return leased


def _snoozed(endings: Iterable[Ending]) -> set[_Run]:
    return {
        _run_of(ending.message)
        for ending in endings
        if isinstance(ending, HandBack) and ending.is_snooze
    }


def _run_of(message: Message) -> _Run:
    return message.lease.task_id, message.is_cancellation


def _raise_failure(endings: Iterable[Ending], error: BaseException | None) -> None:
    """Raise what a handler has failed by, which may be what it returned."""
    failed = next((ending for ending in endings if isinstance(ending, Nack)), None)
    if failed and not isinstance(error, Verdict):
        raise error or KanthorqError(failed.failure.error)


def _settled(
    round_: Round, acknowledger: Acknowledger
) -> tuple[list[Ending], BaseException | None]:
    """Handle a round and write how it ends; return that, and what was raised."""
    with committing():
        for flight in round_:
            flight.start()
        result, error = async_to_sync(_acall)(round_) if round_[0].is_async else _call(round_)
        endings = _endings(round_, result, error)
    with committing():
        acknowledger.write(endings)
    return endings, error


def _endings(round_: Round, result: Any, error: BaseException | None) -> list[Ending]:
    """Do what ``execute()`` and ``aexecute()`` do, on the connections of the test to the end."""
    if isinstance(error, asyncio.CancelledError) and round_[0].is_async:
        return after_interrupt(error, *round_)
    if error is not None:
        return after_error(round_, error)
    for flight in round_:
        _settle_if_written(flight.message)
    return concluded(after_return, round_, result)


def _call(round_: Round) -> tuple[Any, BaseException | None]:
    try:
        return call(round_), None
    except KeyboardInterrupt:
        raise  # it is the test that is to end
    except BaseException as error:  # noqa: BLE001  # as execute() does
        return None, error


async def _acall(round_: Round) -> tuple[Any, BaseException | None]:
    try:
        return await acall(round_), None
    except BaseException as error:
        task = asyncio.current_task()
        is_interrupted = isinstance(error, asyncio.CancelledError) and task and task.cancelling()
        if isinstance(error, KeyboardInterrupt) or is_interrupted:
            raise  # as above
        return None, error


def _settle_if_written(message: Message) -> None:
    """Ask the row where no commit will ever tell: a test drains inside its own transaction."""
    is_undecided = message.has_verdict() and not message.is_settled()
    if is_undecided and connections[message.using].in_atomic_block and not message.is_open():
        message.note_settled()
