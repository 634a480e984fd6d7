"""Step 4 of 5, handle: run one message and say how its task is to end.

The next step is the verdict: a handler gives it through message.py, or its return and its
exceptions are turned into one here, which the acknowledger writes.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import transaction

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.verdicts import Discard, Retry, Snooze
from kanthorq_django.exceptions import KanthorqError, LeaseLost, TaskCancelled
from kanthorq_django.message import Message, encode_result
from kanthorq_django.models.lease import Lease
from kanthorq_django.worker.flight import Flight

logger = logging.getLogger("kanthorq_django.worker")

VERDICT_ROLLED_BACK = "The transaction in which the message was ended was rolled back."
UNTOLD_DELAY = timedelta(minutes=1)  # before the next attempt when not even the policy can tell


@dataclass(frozen=True, slots=True)
class Ending:
    """How a lease ends. As such: nothing is to be written, the handler has seen to it."""

    message: Message

    @property
    def lease(self) -> Lease:
        return self.message.lease


@dataclass(frozen=True, slots=True)
class Ack(Ending):
    """The task is done, with its result as JSON text."""

    result: str | None


@dataclass(frozen=True, slots=True)
class Nack(Ending):
    """The attempt failed; the next one waits for ``delay``, unless there is to be none."""

    failure: Failure
    delay: timedelta
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class HandBack(Ending):
    """The task runs again after ``delay``, and this attempt is not counted."""

    delay: timedelta


def execute(flight: Flight) -> Ending:
    """Run a plain handler; every exception becomes an ending, so the worker lives on."""
    message = flight.message
    try:
        if flight.subscription.atomic:
            result = _call_in_transaction(flight)
        else:
            result = flight.handler(message)
    except BaseException as error:  # noqa: BLE001  # sys.exit() in a handler is its failure, not ours
        return _concluded(_after_error, flight, error)
    return _concluded(_after_return, flight, result)


async def aexecute(flight: Flight) -> Ending:
    """Run an ``async def`` handler, as ``execute()`` does."""
    try:
        result = await flight.handler(flight.message)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit() would end the loop for all others
        return _concluded(_after_error, flight, error)
    return _concluded(_after_return, flight, result)


def after_timeout(flight: Flight) -> Ending:
    """Return the ending of a coroutine that was interrupted because its time was up."""
    error = TimeoutError(f"The handler took longer than its timeout of {flight.timeout}.")
    return _concluded(_after_error, flight, error)


def after_interrupt(flight: Flight) -> Ending:
    """Return the ending of a coroutine that was interrupted: cancelled, or its lease is gone."""
    error = TaskCancelled("The handler was interrupted: it was to stop.")
    return _concluded(_after_error, flight, error)


def _concluded(step: Callable[[Flight, Any], Ending], flight: Flight, outcome: Any) -> Ending:
    """Return what ``step`` makes of the outcome, whatever goes wrong on the way.

    A retry policy, a logging filter or the text of an exception may raise too; a thread that
    died of it would leave the task leased for as long as the process lives.
    """
    try:
        return step(flight, outcome)
    except Exception as error:
        with contextlib.suppress(Exception):
            logger.exception("The outcome of a handler could not be told.")
        failure = Failure(f"The handler's outcome could not be told: {type(error).__name__}.")
        return Nack(flight.message, failure, UNTOLD_DELAY)


def _call_in_transaction(flight: Flight) -> Any:
    message = flight.message
    with transaction.atomic(using=message.task._state.db):
        result = flight.handler(message)
        _refuse_awaitable(flight, result)
        if not message.has_verdict():
            message.ack(result)
        elif message.is_open():
            raise KanthorqError(VERDICT_ROLLED_BACK)
    return result


def _after_return(flight: Flight, result: Any) -> Ending:
    message = flight.message
    if message.is_settled():
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
        case Snooze():
            _log(flight, logging.INFO, "snoozed")
            return HandBack(message, error.delay)
        case Retry():
            return _failed(flight, error, delay=error.after)
        case Discard():
            return _failed(flight, error, is_final=True)
        case LeaseLost():
            _log(flight, logging.WARNING, "lost its lease; its transaction was rolled back")
            return _nack(message, error)
    return _failed(flight, error)


def _failed(flight: Flight, reason: BaseException | str, **options: Any) -> Nack:
    error = reason if isinstance(reason, BaseException) else None
    _log(flight, logging.WARNING, f"failed: {type(reason).__name__ if error else reason}", error)
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
    if inspect.isawaitable(result):
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
        "%s %s: attempt %d of event %s %s in %.1f ms",
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
