"""Step 4 of 5, handle: run one message and say how its task is to end.

The next step is the verdict: a handler gives it through message.py, or its return and its
exceptions are turned into one by endings.py, which the acknowledger writes. How several tasks share
a transaction is in group_commit.py.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from django.db import connections, transaction

from kanthorq_django import signals
from kanthorq_django.conf import get_settings
from kanthorq_django.exceptions import KanthorqError, LeaseLost
from kanthorq_django.message import Message, decide
from kanthorq_django.models import Task
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.publishing.hops import following
from kanthorq_django.sql.transactions import is_aborted
from kanthorq_django.worker import forks
from kanthorq_django.worker.endings import (
    VERDICT_ROLLED_BACK,
    Ending,
    after_error,
    after_return,
    concluded,
    kept_result,
)
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.stacks import calls_handler

_UNCOUNTED = contextlib.nullcontext()
REPLACED = "The handler replaced the connection on which its transaction was open."
MARKED_FOR_ROLLBACK = (
    "The handler left its transaction marked for rollback: it caught an error of the database "
    "without undoing what failed, or called set_rollback(). Put a statement that may fail into a "
    "transaction.atomic() of its own, inside of the try."
)
SHARED_LOST = "One of the leases is over whose handlers shared a transaction."


def execute(*flights: Flight) -> list[Ending]:
    """Run a plain handler once; every exception becomes endings, so the worker lives on."""
    try:
        result = call(flights)
    except BaseException as error:  # noqa: BLE001  # sys.exit() in a handler is its failure, not ours
        return after_error(flights, error)
    return concluded(after_return, flights, result)


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
    is_atomic = flights[0].subscription.atomic
    return _call_in_transaction(flights) if is_atomic else call_handler(flights)


@calls_handler
async def acall(flights: Sequence[Flight]) -> Any:
    """Call and await the handler."""
    depth = forks.depth
    try:
        with counting_hops(flights):
            return await call_handler(flights)
    finally:
        forks.leave_as_child_of(depth)


@calls_handler
def call_handler(flights: Sequence[Flight]) -> Any:
    """Call the handler with its message, or with the list of them if it takes batches."""
    first, depth = flights[0], forks.depth
    try:
        with counting_hops(flights):
            if first.subscription.batch == 1 or first.is_cancellation:
                return first.handler(first.message)
            return first.handler([flight.message for flight in flights])
    finally:
        forks.leave_as_child_of(depth)


def counting_hops(flights: Sequence[Flight]) -> contextlib.AbstractContextManager[None]:
    if get_settings().HOPS_MAX is None:
        return _UNCOUNTED
    return following(flight.message.event for flight in flights)


def _call_in_transaction(flights: Sequence[Flight]) -> Any:
    """Run the handler and its verdicts in one block: all of it commits, or none."""
    using = flights[0].message.using
    acked: list[Message] = []
    try:
        with counting_hops(flights), transaction.atomic(using=using):  # its hooks are counted, too
            result = _call_and_ack(flights, acked, using)
    except BaseException:
        lasting = [message for message in acked if message.is_settled()]  # it was one of its hooks
        tell_of_acked(lasting)
        raise
    tell_of_acked(acked)
    return result


def _call_and_ack(flights: Sequence[Flight], acked: list[Message], using: str) -> Any:
    """Run the handler in the open block, and end well what it has not ended: ``acked``."""
    messages = [flight.message for flight in flights]
    opened = Opened.by(using)
    result = call_handler(flights)
    opened.refuse_unfit()
    for message in messages:
        if message.has_verdict() and message.is_open():
            raise message.refusal or KanthorqError(VERDICT_ROLLED_BACK)
    unsaid = [message for message in messages if not message.has_verdict()]
    kept = kept_result(flights[0], result) if unsaid else None
    end = ack_and_commit if len(unsaid) == 1 else ack_each
    end(dict.fromkeys(unsaid, kept), using)
    acked += unsaid
    return result


class Opened(NamedTuple):
    """The connection on which a block was opened: Django's wrapper, and psycopg's in it."""

    using: str
    wrapper: Any  # the stubs know no rollback_exc
    raw: Any

    @classmethod
    def by(cls, using: str) -> Self:
        wrapper: Any = connections[using]
        wrapper.rollback_exc = None  # Django keeps that of an earlier block
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
        # Django marks a block in which a save() fails, and not one in which a plain statement does.
        if self.wrapper.needs_rollback or is_aborted(self.raw):
            raise KanthorqError(MARKED_FOR_ROLLBACK) from self.wrapper.rollback_exc


def ack_and_commit(results: Mapping[Message, str | None], using: str) -> None:
    """End tasks well and commit the open block of ``using``, whose last act this has to be.

    Raises LeaseLost unless every one of them was still ours.
    """
    if not results or len(connections[using].atomic_blocks) > 1:  # a test drains inside its own
        return ack_each(results, using)
    if not lease.ack_and_commit(_by_lease(results), using):
        if len(results) > 1:
            raise LeaseLost(SHARED_LOST)
        raise next(iter(results)).lost()
    for message in results:
        message.note_settled()
    return None


def ack_each(results: Mapping[Message, str | None], using: str) -> None:
    """End tasks well, in one statement, inside the open block of ``using``.

    Raises LeaseLost unless every one of them was still ours.
    """
    if not results:
        return
    ours = lease.ack(_by_lease(results), using)
    for message in results:
        if message.lease.task_id not in ours:
            raise message.lost()
    decide(list(results), using)


def _by_lease(results: Mapping[Message, str | None]) -> dict[lease.Lease, str | None]:
    return {message.lease: result for message, result in results.items()}


def tell_of_acked(acked: Iterable[Message]) -> None:
    """Tell receivers, outside of the block: an error in theirs would roll back what it can."""
    if signals.acked.has_listeners(Task):
        for message in acked:
            signals.tell_of_what_lasts(signals.acked, Task, message=message)
