"""Step 4 of 5, handle: run one message and say how its task is to end.

The next step is the verdict: a handler gives it through message.py, or its return and its
exceptions are turned into one here, which the acknowledger writes.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import connections, transaction

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.failures import Failure, one_line
from kanthorq_django.domain.verdicts import Discard, Retry, Snooze, Verdict
from kanthorq_django.exceptions import KanthorqError, LeaseLost, TaskCancelled
from kanthorq_django.message import Message, ack_each, encode_result
from kanthorq_django.models.hops import following
from kanthorq_django.models.lease import AT_ONCE, Lease
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.upkeep import note_refusal

logger = logging.getLogger("kanthorq_django.worker")

_UNCOUNTED = contextlib.nullcontext()
VERDICT_ROLLED_BACK = "The transaction in which the message was ended was rolled back."
SHARED_SECONDS = 0.02  # after which a shared transaction begins no further handler
UNTOLD_DELAY = timedelta(minutes=1)  # before the next attempt when not even the policy can tell


@dataclass(slots=True)
class Ending:
    """How a lease ends. As such: nothing is to be written, the handler has seen to it."""

    message: Message

    @property
    def lease(self) -> Lease:
        return self.message.lease


@dataclass(slots=True)
class Ack(Ending):
    """The task is done, with its result as JSON text."""

    result: str | None


@dataclass(slots=True)
class Nack(Ending):
    """The attempt failed; the next one waits for ``delay``, unless there is to be none."""

    failure: Failure
    delay: timedelta
    is_final: bool = False


@dataclass(slots=True)
class HandBack(Ending):
    """The task runs again after ``delay``, and this attempt is not counted."""

    delay: timedelta


def execute(*flights: Flight) -> list[Ending]:
    """Run a plain handler once; every exception becomes endings, so the worker lives on."""
    try:
        call = _call_in_transaction if flights[0].subscription.atomic else _call
        result = call(flights)
    except BaseException as error:  # noqa: BLE001  # sys.exit() in a handler is its failure, not ours
        return _concluded(_after_error, flights, error)
    return _concluded(_after_return, flights, result)


def execute_together(*flights: Flight) -> list[Ending]:
    """Run one handler for each of ``flights`` in few transactions: few commits, few acks.

    Each has a savepoint, so one that fails undoes only itself. If a transaction as a whole
    fails, by a lost lease, a deadlock or its commit, its handlers are run again, each on its
    own; if it was committed after all, the fence takes the second run back.
    """
    endings: list[Ending] = []
    left = list(flights)
    while left:
        endings += _share_transaction(left)
    return endings


def _share_transaction(left: list[Flight]) -> list[Ending]:
    """Run the first of ``left``, taking them from it, in a transaction that does not last."""
    using = left[0].message.using
    begun: list[Flight] = []
    try:
        with transaction.atomic(using=using):
            results, failed = _run_in_savepoints(left, begun, using)
            ack_each(results, using)
            _keep_hooks_apart(using)
    except BaseException:  # noqa: BLE001  # whatever it was, it was of the whole, not of one
        for flight in begun:
            flight.message.reopen()
        return [ending for flight in begun for ending in execute(flight)]
    have_failed = {ending.lease for ending in failed}
    handled = [flight for flight in begun if flight.lease not in have_failed]
    return failed + _concluded(_after_return, handled, None)


def _run_in_savepoints(
    left: list[Flight], begun: list[Flight], using: str
) -> tuple[dict[Message, str | None], list[Ending]]:
    """Move flights from ``left`` to ``begun`` and run them; return what to ack, and failures."""
    until = time.monotonic() + SHARED_SECONDS
    results: dict[Message, str | None] = {}
    failed: list[Ending] = []
    while left and (not begun or time.monotonic() < until):
        begun.append(left.pop(0))
        try:
            results |= _call_in_savepoint(begun[-1], using)
        except BaseException as error:  # noqa: BLE001  # as in execute()
            failed += _concluded(_after_error, begun[-1:], error)
    return results, failed


async def aexecute(*flights: Flight) -> list[Ending]:
    """Run an ``async def`` handler, as ``execute()`` does."""
    try:
        with _counting_hops(flights):
            result = await _call(flights)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit() would end the loop for all others
        return _concluded(_after_error, flights, error)
    return _concluded(_after_return, flights, result)


def after_timeout(*flights: Flight) -> list[Ending]:
    """Return the endings of a coroutine that was interrupted because its time was up."""
    error = TimeoutError(f"The handler took longer than its timeout of {flights[0].timeout}.")
    return _concluded(_after_error, flights, error)


def after_interrupt(*flights: Flight) -> list[Ending]:
    """Return the endings of an interrupted coroutine: cancelled, or its leases are gone."""
    error = TaskCancelled("The handler was interrupted: it was to stop.")
    return _concluded(_after_error, flights, error)


def _call(flights: Sequence[Flight]) -> Any:
    """Call the handler with its message, or with the list of them if it takes batches."""
    first = flights[0]
    with _counting_hops(flights):
        if first.subscription.batch == 1 or first.is_cancellation:
            return first.handler(first.message)
        return first.handler([flight.message for flight in flights])


def _counting_hops(flights: Sequence[Flight]) -> contextlib.AbstractContextManager[None]:
    if get_settings().HOPS_MAX is None:
        return _UNCOUNTED
    return following(flight.message.event for flight in flights)


def _concluded(
    step: Callable[[Flight, Any], Ending], flights: Iterable[Flight], outcome: Any
) -> list[Ending]:
    """Return what ``step`` makes of the outcome for each message, whatever goes wrong on the way.

    A retry policy, a logging filter or the text of an exception may raise too; a thread that
    died of it would leave the tasks leased for as long as the process lives.
    """
    endings = []
    for flight in flights:
        try:
            endings.append(step(flight, outcome))
        except Exception as error:
            with contextlib.suppress(Exception):
                logger.exception("The outcome of a handler could not be told.")
            failure = Failure(f"The handler's outcome could not be told: {type(error).__name__}.")
            endings.append(Nack(flight.message, failure, UNTOLD_DELAY))
    return endings


def _call_in_transaction(flights: Sequence[Flight]) -> Any:
    """Run the handler and its verdicts in one block: all of it commits, or none."""
    using = flights[0].message.using
    messages = [flight.message for flight in flights]
    with transaction.atomic(using=using):
        result = _call(flights)
        _refuse_awaitable(flights[0], result)
        if any(message.has_verdict() and message.is_open() for message in messages):
            raise KanthorqError(VERDICT_ROLLED_BACK)
        if unsaid := [message for message in messages if not message.has_verdict()]:
            ack_each(dict.fromkeys(unsaid, encode_result(result)), using)
    return result


def _keep_hooks_apart(using: str) -> None:
    """Let a hook that raises not keep those of other tasks from running after the commit."""
    hooks: list[Any] = connections[using].run_on_commit
    hooks[:] = [(savepoints, hook, True) for savepoints, hook, _ in hooks]


def _call_in_savepoint(flight: Flight, using: str) -> dict[Message, str | None]:
    """Return the message with its result as JSON, or nothing if the handler ended it itself."""
    message = flight.message
    with transaction.atomic(using=using):
        result = _call([flight])
        _refuse_awaitable(flight, result)
        if not message.has_verdict():
            return {message: encode_result(result)}
        if message.is_open():
            raise KanthorqError(VERDICT_ROLLED_BACK)
    return {}


def _after_return(flight: Flight, result: Any) -> Ending:
    message = flight.message
    if message.is_settled() or _is_settled_in_test(message):
        _log(flight, logging.INFO, "settled by its handler")
        return Ending(message)
    if message.has_verdict():
        # Fenced like any nack: if the verdict was committed after all, the row says so.
        return _failed(flight, VERDICT_ROLLED_BACK)
    try:
        _refuse_awaitable(flight, result)
        ending = Ack(message, encode_result(result))
    except KanthorqError as error:
        return _after_error(flight, error)
    _log(flight, logging.INFO, "handled")
    return ending


def _after_error(flight: Flight, error: BaseException) -> Ending:
    message = flight.message
    if message.is_settled():
        _log(flight, logging.ERROR, "raised after it was settled", error)
        return Ending(message)
    match error:
        case Verdict():
            return _after_verdict(flight, error)
        case LeaseLost():
            return _after_stop(flight, error)
        case TaskCancelled() if flight.stop.is_set() or flight.subscription.batch > 1:
            return _after_stop(flight, error)
    return _failed(flight, error)


def _after_verdict(flight: Flight, verdict: Verdict) -> Ending:
    """Return the ending that the handler asked for by raising."""
    match verdict:
        case Snooze():
            _log(flight, logging.INFO, "snoozed")
            return HandBack(flight.message, verdict.delay)
        case Retry():
            _log(flight, logging.INFO, f"asked to be tried again in {verdict.after}")
            return _nack(flight.message, verdict, delay=verdict.after)
        case Discard():
            reason = one_line(str(verdict.reason))
            _log(flight, logging.WARNING, f"was discarded by its handler: {reason}")
            return _nack(flight.message, verdict, is_final=True)
    return _failed(flight, verdict)


def _after_stop(flight: Flight, error: BaseException) -> Ending:
    """Return the ending of what stopped because a lease is lost or was asked back."""
    if isinstance(error, LeaseLost):
        _log(flight, logging.WARNING, "lost its lease, alone or with its batch; rolled back")
    else:
        _log(flight, logging.INFO, "stopped, as it was asked to")
    # Of a batch only one may be meant; the others are none the worse for it.
    is_meant = flight.subscription.batch == 1 or flight.stop.is_set()
    return _nack(flight.message, error) if is_meant else HandBack(flight.message, AT_ONCE)


def _is_settled_in_test(message: Message) -> bool:
    """Ask the row where no commit will ever tell: a test drains inside its own transaction."""
    using = message.using
    return message.has_verdict() and connections[using].in_atomic_block and not message.is_open()


def _failed(flight: Flight, reason: BaseException | str, **options: Any) -> Nack:
    error = reason if isinstance(reason, BaseException) else None
    note_refusal(error)
    _log(flight, logging.WARNING, f"failed: {type(reason).__name__ if error else reason!r}", error)
    return _nack(flight.message, reason, **options)


def _nack(
    message: Message,
    reason: BaseException | str,
    *,
    delay: timedelta | None = None,
    is_final: bool = False,
) -> Nack:
    if delay is None:
        delay = message.retry_delay()
    failure = Failure.of(reason, stack_size_max=get_settings().ERROR_SIZE_MAX)
    return Nack(message, failure, delay, is_final)


def _refuse_awaitable(flight: Flight, result: Any) -> None:
    if result is not None and inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise KanthorqError(
            f"{flight.subscription.place} returned an awaitable that nobody awaits; declare it "
            "with async def."
        )


def _log(flight: Flight, level: int, what: str, error: BaseException | None = None) -> None:
    if not logger.isEnabledFor(level):
        return
    message, started_at = flight.message, flight.started_at or time.monotonic()
    elapsed_ms = round((time.monotonic() - started_at) * 1_000, 3)
    logger.log(
        level,
        "%s %s: attempt %d of event %s %s (%.1f ms)",
        flight.subscription.consumer,
        message.event.subject,
        message.attempt,
        message.event.pk,
        what,
        elapsed_ms,
        exc_info=error,
        extra={
            "consumer": flight.subscription.consumer,
            "event_id": str(message.event.pk),
            "subject": message.event.subject,
            "attempt": message.attempt,
            "milliseconds": elapsed_ms,
        },
    )
