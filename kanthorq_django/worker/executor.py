"""Step 4 of 5, handle: run one message and say how its task is to end.

The next step is the verdict: a handler gives it through message.py, or its return and its
exceptions are turned into one by endings.py, which the acknowledger writes.
"""

import asyncio
import contextlib
import functools
import itertools
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django import signals
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.subscriptions import name_of
from kanthorq_django.exceptions import KanthorqError, LeaseLost
from kanthorq_django.message import Message, decide
from kanthorq_django.models import Task, lease
from kanthorq_django.models.hops import following
from kanthorq_django.worker.endings import (
    VERDICT_ROLLED_BACK,
    Ending,
    HandBack,
    after_error,
    after_return,
    concluded,
    kept_result,
)
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.log import logger

_UNCOUNTED = contextlib.nullcontext()
REPLACED = "The handler replaced the connection on which its transaction was open."
MARKED_FOR_ROLLBACK = "The handler left its transaction marked for rollback."
SHARED_LOST = "One of the leases is over whose handlers shared a transaction."
# After which a shared transaction begins no further handler. By the clock: where ten threads share
# a processor, each of them is slow, and a short time would leave transactions of two or three.
SHARED_SECONDS = 0.25
CAREFUL_SECONDS = 60.0  # with savepoints, after a shared transaction that failed

_careful_until: dict[str, float] = {}  # by consumer


def execute(*flights: Flight) -> list[Ending]:
    """Run a plain handler once; every exception becomes endings, so the worker lives on."""
    try:
        result = call(flights)
    except BaseException as error:  # noqa: BLE001  # sys.exit() in a handler is its failure, not ours
        return after_error(flights, error)
    return concluded(after_return, flights, result)


def execute_together(flight: Flight, others: Iterator[Flight]) -> tuple[list[Ending], list[Flight]]:
    """Run the handler for ``flight``, then for each of ``others``, in one transaction.

    One commit, one ack. After ``SHARED_SECONDS`` no further one is begun. Returns the endings, and
    the flights that are to be run again, each on its own: if the transaction of several failed, by
    a handler, a lost lease, a deadlock or its commit, all of them. If it was committed after all,
    the fence takes the second run back. Handlers one of which raised of late have savepoints: it
    undoes only itself then.
    """
    subscription, using = flight.subscription, flight.message.using
    is_careful = time.monotonic() < _careful_until.get(subscription.consumer, 0.0)
    run = _run_in_savepoints if is_careful else _run_in_one
    begun: list[Flight] = []
    first_hooks: list[int] = []  # of each that has begun, by their places
    try:
        with transaction.atomic(using=using):
            flights = _noting_hooks(_in_time(flight, others, begun), first_hooks, using)
            results, failed = run(flights, _Opened.by(using))
            _keep_hooks_apart(begun, first_hooks, using)
            _ack_and_commit(results, using)
    except BaseException as error:  # noqa: BLE001  # as in execute()
        if not begun:  # the transaction itself could not be begun
            return [HandBack(flight.message, lease.AT_ONCE)], []
        if len(begun) == 1 or any(each.message.is_settled() for each in begun):
            return after_error(begun, error), []  # what is committed is never run again
        _careful_until[subscription.consumer] = time.monotonic() + CAREFUL_SECONDS
        for spoiled in begun:  # each of them tells for itself when it is run again
            spoiled.message.reopen()
        return [], begun
    _tell(results)
    have_failed = {ending.lease for ending in failed}
    handled = [each for each in begun if each.lease not in have_failed]
    return failed + concluded(after_return, handled, None), []


def _run_in_one(
    flights: Iterable[Flight], opened: "_Opened"
) -> tuple[dict[Message, str | None], list[Ending]]:
    """Run flights; return what to ack."""
    results: dict[Message, str | None] = {}
    for flight in flights:
        results |= _call_and_keep(flight, opened)
    return results, []


def _run_in_savepoints(
    flights: Iterable[Flight], opened: "_Opened"
) -> tuple[dict[Message, str | None], list[Ending]]:
    """Do the same, so that one that fails is told of and undoes only itself."""
    results: dict[Message, str | None] = {}
    failed: list[Ending] = []
    for flight in flights:
        try:
            with transaction.atomic(using=opened.using):
                kept = _call_and_keep(flight, opened)
            results |= kept
        except BaseException as error:  # as in execute()
            if opened.wrapper.needs_rollback or not opened.is_kept:
                raise  # a lost lease lets nothing commit, not even around its savepoint
            failed += after_error([flight], error)
    return results, failed


def _in_time(flight: Flight, others: Iterator[Flight], begun: list[Flight]) -> Iterator[Flight]:
    """Yield ``flight`` and others until it is too late for more; note them in ``begun``."""
    until = time.monotonic() + SHARED_SECONDS
    for each in itertools.chain([flight], others):
        begun.append(each)
        yield each
        if time.monotonic() >= until:
            return


async def aexecute(*flights: Flight) -> list[Ending]:
    """Run an ``async def`` handler, as ``execute()`` does."""
    try:
        result = await acall(flights)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit() would end the loop for all others
        return after_error(flights, error)
    return concluded(after_return, flights, result)


def call(flights: Sequence[Flight]) -> Any:
    """Call the handler and return what it does, in a transaction of its own if it is to be so."""
    return _call_in_transaction(flights) if flights[0].subscription.atomic else _call(flights)


async def acall(flights: Sequence[Flight]) -> Any:
    """Call and await the handler."""
    pid = os.getpid()
    try:
        with _counting_hops(flights):
            return await _call(flights)
    finally:
        leave_as_child_of(pid)


def _call(flights: Sequence[Flight]) -> Any:
    """Call the handler with its message, or with the list of them if it takes batches."""
    first, pid = flights[0], os.getpid()
    try:
        with _counting_hops(flights):
            if first.subscription.batch == 1 or first.is_cancellation:
                return first.handler(first.message)
            return first.handler([flight.message for flight in flights])
    finally:
        leave_as_child_of(pid)


def leave_as_child_of(pid: int) -> None:
    """End this process unless it is ``pid``: a child that a handler forked is no second worker.

    At once, before it is through with any block of ours: it has its parent's connections.
    """
    if os.getpid() != pid:
        os._exit(1)


def _counting_hops(flights: Sequence[Flight]) -> contextlib.AbstractContextManager[None]:
    if get_settings().HOPS_MAX is None:
        return _UNCOUNTED
    return following(flight.message.event for flight in flights)


def _call_in_transaction(flights: Sequence[Flight]) -> Any:
    """Run the handler and its verdicts in one block: all of it commits, or none."""
    using = flights[0].message.using
    acked: list[Message] = []
    try:
        with _counting_hops(flights), transaction.atomic(using=using):  # its hooks are counted, too
            result = _call_and_ack(flights, acked, using)
    except BaseException:
        _tell([message for message in acked if message.is_settled()])  # it was one of its hooks
        raise
    _tell(acked)
    return result


def _call_and_ack(flights: Sequence[Flight], acked: list[Message], using: str) -> Any:
    """Run the handler in the open block, and end well what it has not ended: ``acked``."""
    messages = [flight.message for flight in flights]
    opened = _Opened.by(using)
    result = _call(flights)
    opened.refuse_unfit()
    for message in messages:
        if message.has_verdict() and message.is_open():
            raise message.refusal or KanthorqError(VERDICT_ROLLED_BACK)
    unsaid = [message for message in messages if not message.has_verdict()]
    kept = kept_result(flights[0], result) if unsaid else None
    end = _ack_and_commit if len(unsaid) == 1 else _ack_each
    end(dict.fromkeys(unsaid, kept), using)
    acked += unsaid
    return result


class _Opened(NamedTuple):
    """The connection on which a block was opened: Django's wrapper, and psycopg's in it."""

    using: str
    wrapper: BaseDatabaseWrapper
    raw: Any

    @classmethod
    def by(cls, using: str) -> Self:
        wrapper = connections[using]
        return cls(using, wrapper, wrapper.connection)

    @property
    def is_kept(self) -> bool:
        return connections[self.using] is self.wrapper and self.wrapper.connection is self.raw

    def refuse_unfit(self) -> None:
        """Raise KanthorqError if what a handler wrote is lost, so its task must not end well.

        It has put another connection in the place of this one, or wants the block rolled back.
        """
        if not self.is_kept:
            self.raw.close()  # or what it locked stays locked until somebody collects it
            self.wrapper.close()
            raise KanthorqError(REPLACED)
        if self.wrapper.needs_rollback:
            raise KanthorqError(MARKED_FOR_ROLLBACK)


def _noting_hooks(
    flights: Iterable[Flight], first_hooks: list[int], using: str
) -> Iterator[Flight]:
    """Yield flights; note where in the block's hooks those of each begin."""
    for flight in flights:
        first_hooks.append(len(connections[using].run_on_commit))
        yield flight


def _keep_hooks_apart(flights: Sequence[Flight], first_hooks: Sequence[int], using: str) -> None:
    """Let a hook that raises or exits not keep those of other tasks from running."""
    hooks: list[Any] = connections[using].run_on_commit
    owners = [flights[bisect_right(first_hooks, place) - 1] for place in range(len(hooks))]
    hooks[:] = [
        (savepoints, functools.partial(_run_apart, hook, owner), True)
        for (savepoints, hook, _), owner in zip(hooks, owners, strict=True)
    ]


def _run_apart(hook: Callable[[], object], flight: Flight) -> None:
    """Run a hook of ``transaction.on_commit()``; Django would let pass what is no Exception."""
    try:
        with _counting_hops([flight]):
            hook()
    except BaseException:
        logger.exception("A hook of a committed transaction, %s, failed.", name_of(hook))


def _call_and_keep(flight: Flight, opened: _Opened) -> dict[Message, str | None]:
    """Return the message with its result as JSON, or nothing if the handler ended it itself."""
    message = flight.message
    result = _call([flight])
    opened.refuse_unfit()
    if not message.has_verdict():
        return {message: kept_result(flight, result)}
    if message.is_open():
        raise message.refusal or KanthorqError(VERDICT_ROLLED_BACK)
    return {}


def _ack_and_commit(results: Mapping[Message, str | None], using: str) -> None:
    """End tasks well and commit the open block of ``using``, whose last act this has to be.

    Raises LeaseLost unless every one of them was still ours.
    """
    if not results or len(connections[using].atomic_blocks) > 1:  # a test drains inside its own
        return _ack_each(results, using)
    if not lease.ack_and_commit(_by_lease(results), using):
        if len(results) > 1:
            raise LeaseLost(SHARED_LOST)
        raise next(iter(results)).lost()
    for message in results:
        message.endure()
    return None


def _ack_each(results: Mapping[Message, str | None], using: str) -> None:
    """End tasks well, in one statement, inside the open block of ``using``.

    Raises LeaseLost unless every one of them was still ours.
    """
    if not results:
        return
    settled = lease.ack(_by_lease(results), using)
    for message in results:
        if message.lease.task_id not in settled:
            raise message.lost()
    decide(list(results), using)


def _by_lease(results: Mapping[Message, str | None]) -> dict[lease.Lease, str | None]:
    return {message.lease: result for message, result in results.items()}


def _tell(acked: Iterable[Message]) -> None:
    """Tell receivers, outside of the block: an error in theirs would roll back what it can."""
    if signals.acked.has_listeners(Task):
        for message in acked:
            signals.tell_of_what_lasts(signals.acked, Task, message=message)
