"""Step 5 of 5, ack: what a handler is given, and the ways in which it may end its task.

``ack()`` and ``nack()`` join an open ``transaction.atomic()`` of the tasks' database: business
writes and the end of the task commit together or not at all. Every statement is fenced by the
lease's epoch, and the row, not an object in memory, says whether a task is settled; so a block
that rolls back leaves the message as open as it was.
"""

import functools
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from asgiref.sync import sync_to_async
from django.db import Error, InterfaceError, OperationalError, connections, transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Greatest, Now
from django.dispatch import Signal
from django.utils.asyncio import async_unsafe

from kanthorq_django import signals
from kanthorq_django.conf import get_settings
from kanthorq_django.domain import states
from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.interrupts import is_interrupt
from kanthorq_django.domain.retry import Polynomial, check_delay
from kanthorq_django.domain.states import LEASED, TaskState
from kanthorq_django.domain.subscriptions import policy_for
from kanthorq_django.exceptions import (
    AlreadyAcknowledged,
    CrossDatabaseAck,
    LeaseLost,
    TaskCancelled,
)
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.leased import Leased
from kanthorq_django.models.event import Event
from kanthorq_django.models.fields import EPOCH
from kanthorq_django.models.isolation import unconflicted
from kanthorq_django.models.publishing.body import encode_json
from kanthorq_django.models.task import Task
from kanthorq_django.sql.transactions import forbid_commit, is_outside, open_transaction, own_blocks

logger = logging.getLogger("kanthorq_django")

# Why a handler is to stop.
ASKED = "somebody asked for it"
LEASE_OVER = "its lease is over"
TIME_UP = "its time is up"
LEAVING = "its worker is to end"
IN_COROUTINE = "{0}() cannot be called from an async context; use `await message.a{0}(…)`."


class Stop:
    """Whether and why a handler should stop.

    No ``threading.Event``: each message would have to pay for its lock and its condition.
    """

    __slots__ = ("reason",)

    def __init__(self) -> None:
        self.reason = ""  # the end of a sentence; the first one given stays

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason

    def is_set(self) -> bool:
        return bool(self.reason)


class Message:
    """An event, its leased task, and the ways to end it."""

    def __init__(self, task: Task | Leased, *, stop: Stop | None = None) -> None:
        self._leased = task if isinstance(task, Leased) else Leased.of(task)
        self.lease = self._leased.lease
        self._stop = stop or Stop()
        # What the handler decided itself. A rolled-back verdict never settles anything.
        self._has_verdict = False
        self._is_settled = False
        self._refusal: Error | None = None  # why the database did not take its verdict
        self._given_in: tuple[object, object] | None = None  # the transaction of its verdict
        self.failure: Failure | None = None  # what it gave to nack()

    def __repr__(self) -> str:
        return f"<Message: {self.event}, {self.task}, attempt {self.attempt}>"

    @property
    def event(self) -> Event:
        """Its event. Raises DoesNotExist if somebody has deleted that."""
        return self._leased.event

    @property
    def task(self) -> Task:
        return self._leased.task

    @property
    def attempt(self) -> int:
        """Which attempt this is, counted from 1; of its own for a cancellation handler."""
        return self._leased.attempt

    @property
    def is_cancellation(self) -> bool:
        """Whether this is for the cancellation handler."""
        return self._leased.is_cancellation

    @property
    def using(self) -> str:
        """The database of the task, in which it is acknowledged."""
        return self._leased.using

    @property
    def lease_epoch(self) -> int:
        return self.lease.epoch

    @property
    def cancelled(self) -> bool:
        """True once the handler should stop: cancellation was asked for, or its lease is gone."""
        return self._stop.is_set()

    def raise_if_cancelled(self) -> None:
        """Raise TaskCancelled once the handler should stop."""
        if self.cancelled:
            raise TaskCancelled(f"{self.task} is to stop: {self._stop.reason}.")

    @async_unsafe(IN_COROUTINE.format("ack"))
    def ack(self, result: Any = None) -> None:
        """End the task well and keep ``result``, any JSON value, with it.

        Inside ``transaction.atomic()`` it commits or rolls back with the block. The same
        verdict again is a no-op. Raises AlreadyAcknowledged after ``nack()``, or in another block
        if the commit of the first got no answer but was carried out; LeaseLost when the task is
        no longer this worker's, CrossDatabaseAck, and InvalidBody for a result that is not JSON.
        """
        using, results = self._check_database(), {self.lease: encode_result(result)}
        with self._noting_refusal(is_ack=True):
            is_ours = bool(lease.ack(results, using))
        if is_ours:
            self.failure = None  # of a nack() that was rolled back
            decide([self], using)
            self._tell(signals.acked)
        elif not self._was_acked():
            raise AlreadyAcknowledged(f"{self.task} was ended with nack() before.")
        else:
            self._refuse_another_block(using)

    @async_unsafe(IN_COROUTINE.format("nack"))
    def nack(self, reason: BaseException | str, *, delay: timedelta | None = None) -> None:
        """Let the task fail with ``reason`` and be tried again after ``delay``.

        Without ``delay`` the consumer's retry policy says when. Joins an open transaction and
        raises as ``ack()`` does, and ValueError unless ``delay`` is zero to ten years.
        """
        using = self._check_database()
        wait = self.retry_delay() if delay is None else delay
        check_delay("delay", wait)
        failure = Failure.of(reason, stack_size_max=get_settings().ERROR_SIZE_MAX)
        with self._noting_refusal(is_ack=False):
            is_ours = bool(lease.nack({self.lease: lease.Failed(failure, wait)}, using))
        if is_ours:
            self.failure = failure
            decide([self], using)
            self._tell(signals.nacked, reason=reason)
        elif self._was_acked():
            raise AlreadyAcknowledged(f"{self.task} was ended with ack() before.")
        else:
            self._refuse_another_block(using)

    async def aack(self, result: Any = None) -> None:
        """Do what ``ack()`` does, from a coroutine."""
        await sync_to_async(self.ack)(result)

    async def anack(self, reason: BaseException | str, *, delay: timedelta | None = None) -> None:
        """Do what ``nack()`` does, from a coroutine."""
        await sync_to_async(self.nack)(reason, delay=delay)

    @async_unsafe(IN_COROUTINE.format("extend"))
    def extend(self, duration: timedelta) -> None:
        """Let the lease end no earlier than ``duration`` from now.

        A worker renews its leases by itself; this is for code that runs without one. Inside
        a transaction others see the new end only after its commit. Raises LeaseLost, and
        ValueError unless ``duration`` is zero to ten years.
        """
        check_delay("duration", duration)
        end = Greatest("schedule_at", Now() + duration)
        # A lease that ran out has given the turn of its key to others.
        ran_out = Q(turn_key__isnull=False, state=TaskState.RUNNING, schedule_at__lte=Now())
        held, using = self._held().exclude(ran_out), self.using
        if not unconflicted(using, held.update, schedule_at=end):
            verdict = "ack" if self._was_acked() else "nack"
            raise LeaseLost(f"There is no lease to extend: {verdict}() has ended {self.task}.")

    async def aextend(self, duration: timedelta) -> None:
        """Do what ``extend()`` does, from a coroutine."""
        await sync_to_async(self.extend)(duration)

    alters_data(ack, nack, extend, aack, anack, aextend)

    # What follows is for whoever runs the handler; a handler needs none of it.

    def retry_delay(self) -> timedelta:
        """Return how long the consumer's retry policy lets the next attempt wait."""
        attempt = max(self.attempt, 1)
        consumer = self._leased.consumer.name
        policy = policy_for(consumer, is_cancellation=self.is_cancellation)
        try:
            delay = policy.next_delay(attempt)
            check_delay("delay", delay)
        except BaseException as error:
            if is_interrupt(error):
                raise
            # A policy may be the project's own code; its fault must not cost the verdict.
            logger.exception("The retry policy of %s failed; the default one decides.", consumer)
            return Polynomial().next_delay(attempt)
        return delay

    def has_verdict(self) -> bool:
        """Tell whether the handler called ``ack()`` or ``nack()``, lasting or not."""
        return self._has_verdict

    @property
    def refusal(self) -> Error | None:
        """What the database said to the last ``ack()`` or ``nack()``, if it did not take it."""
        return self._refusal

    def is_settled(self) -> bool:
        """Tell whether the handler's verdict is known to last; False also while that is unknown."""
        return self._is_settled

    def reopen(self) -> None:
        """Forget a verdict that was rolled back with a transaction which others shared."""
        self._has_verdict = False
        self.failure = self._refusal = None

    def is_open(self) -> bool:
        """Ask the row whether the task can still be ended with this message."""
        return self._held().exists()

    def note_settled(self) -> None:
        """Remember that the handler has spoken, and that this lasts."""
        self._has_verdict = self._is_settled = True

    def lost(self) -> LeaseLost:
        """Return the error to raise, and let no open block commit even if it is swallowed."""
        self._stop.set(LEASE_OVER)
        forbid_commit(self.using)
        return LeaseLost(
            f"Lease {self.lease.epoch} of {self.task} is over: another worker claimed it after "
            "its visibility timeout, or the task was deleted or reset. Nothing of this attempt "
            "may commit."
        )

    @contextmanager
    def _noting_refusal(self, *, is_ack: bool) -> Iterator[None]:
        """Remember a verdict that the database did not take.

        A handler may swallow the error and return. That is no implicit ack: its block was rolled
        back, or it had called ``nack()``. The one exception is an ``ack()`` outside of any block
        that failed with the connection: there the return asks for the same once more.
        """
        self._refusal = None
        try:
            yield
        except Error as error:
            is_lost = isinstance(error, (OperationalError, InterfaceError))
            if not (is_ack and is_lost and open_transaction(self.using) is None):
                self._has_verdict, self._refusal = True, error
            raise

    def _check_database(self) -> str:
        """Return the tasks' database. Raises CrossDatabaseAck if only another one is in a block."""
        using = self.using
        if open_transaction(using) is None:
            for other in connections.all(initialized_only=True):
                if open_transaction(other.alias):
                    raise CrossDatabaseAck(
                        f"The open transaction is in the database {other.alias!r}, the tasks are "
                        f"in {using!r}: they cannot commit together. Acknowledge outside of it, "
                        "or keep both in one database."
                    )
        return using

    def _refuse_another_block(self, using: str) -> None:
        """Raise AlreadyAcknowledged in a block other than that of the verdict, if in doubt.

        The COMMIT of the first block got no answer, so the handler tries again. But it was carried
        out: what the second block writes would be applied twice. Once the verdict is known to last,
        nothing is refused.
        """
        open_now = open_transaction(using)
        if self._given_in is None or open_now in {None, self._given_in} or self._is_settled:
            return
        forbid_commit(self.using)
        raise AlreadyAcknowledged(
            f"{self.task} was ended in an earlier block, whose commit got no answer but was "
            "carried out. Nothing of this block may commit."
        )

    def _tell(self, signal: Signal, **told: Any) -> None:
        # What a receiver raises must not have the handler fail after a verdict that lasts.
        send = signals.tell_of_what_lasts if self._is_settled else Signal.send
        send(signal, Task, message=self, **told)

    def _held(self) -> QuerySet[Task]:
        """Return the task, as long as it is leased to this message."""
        return self._handed_out().filter(lease_epoch=self.lease.epoch, state__in=LEASED)

    def _handed_out(self) -> QuerySet[Task]:
        """Return the task, unless another has its id, or it was leased again since."""
        since = self.lease.since
        # Aware, whatever USE_TZ is: a naive time is two moments when the clocks are set back.
        moment = None if since is None else EPOCH + timedelta(microseconds=since)
        tasks = Task._base_manager.using(self.using)
        return tasks.filter(pk=self.lease.task_id, attempted_at=moment)

    def _was_acked(self) -> bool:
        """Tell how this lease was ended before: True by ack, False by nack.

        Raises LeaseLost when it was not ended by its holder at all.
        """
        columns = ("state", "lease_epoch", "cancel_attempt_count")
        found = self._handed_out().values_list(*columns).first()
        state, epoch, cancel_attempt_count = found or (None,) * 3
        ack = states.ACK_CANCELLING if self.is_cancellation else states.ACK
        nack = states.NACK_CANCELLING if self.is_cancellation else states.NACK
        if epoch == self.lease.epoch and state in {*ack.targets, *nack.targets} - LEASED:
            return state in ack.targets
        # A nack that leads to the cancellation handler ends the lease by raising the epoch;
        # as long as nobody claimed the task since, its counter has not moved.
        counter = self.task.cancel_attempt_count if self.is_cancellation else 0
        nacked = (TaskState.CANCELLING, self.lease.epoch + 1, counter)
        if (state, epoch, cancel_attempt_count) != nacked:
            raise self.lost()
        return False


def decide(messages: Collection[Message], using: str) -> None:
    """Remember that the handler has spoken, and, once it is committed, that this lasts."""
    connection, own = connections[using], own_blocks(using)
    is_in_test = len(own) < len(connection.atomic_blocks)
    given_in = None if is_in_test else open_transaction(using)  # a test's has no COMMIT to doubt
    for message in messages:
        message._has_verdict, message._given_in = True, given_in
    if own:
        transaction.on_commit(functools.partial(_settle_if_kept, messages, using), using=using)
    elif is_in_test or is_outside(connection):
        for message in messages:
            message.note_settled()


def _settle_if_kept(messages: Collection[Message], using: str) -> None:
    """Settle verdicts, after the commit, unless their rows say that nothing was kept.

    Django runs this hook although nothing was kept in two cases: a statement failed past Django,
    so PostgreSQL answered COMMIT with a rollback; or a savepoint that is none of Django's blocks
    was rolled back, which forgets no hook.
    """
    try:
        found = lease.last_states((message.lease for message in messages), using)
    except Error as error:
        logger.info("Whether verdicts last is unknown: %s", error)
        return
    for message in messages:
        if found.get(message.lease) not in LEASED:
            message.note_settled()


def encode_result(result: Any) -> str | None:
    """Return a handler's result as JSON text, None for none. Raises InvalidBody."""
    if result is None:
        return None
    return encode_json("result", result, size_max=get_settings().RESULT_SIZE_MAX)
