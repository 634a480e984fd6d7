"""How a lease ends: what the return and the exceptions of a handler mean for its task."""

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.failures import Failure, one_line
from kanthorq_django.domain.interrupts import is_interrupt
from kanthorq_django.domain.subscriptions import name_of
from kanthorq_django.domain.verdicts import Discard, Retry, Snooze, Verdict
from kanthorq_django.exceptions import InvalidBody, KanthorqError, LeaseLost, TaskCancelled
from kanthorq_django.message import ASKED, LEASE_OVER, LEAVING, TIME_UP, Message, encode_result
from kanthorq_django.models.delivery.lease import AT_ONCE, Lease
from kanthorq_django.worker.attempt_log import last_word, log_attempt, spoken
from kanthorq_django.worker.connections.suspicion import suspect_sessions
from kanthorq_django.worker.connections.upkeep import note_failure
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.stacks import from_handler

VERDICT_ROLLED_BACK = "The transaction in which the message was ended was rolled back."
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
    is_snooze: bool = False  # its handler asked for it


def concluded(
    step: Callable[[Flight, Any], Ending], flights: Iterable[Flight], outcome: Any
) -> list[Ending]:
    """Return what ``step`` makes of the outcome for each message, whatever goes wrong on the way.

    A retry policy or the text of an exception may raise too; a thread that died of it would leave
    the tasks leased for as long as the process lives.
    """
    endings = []
    for flight in flights:
        try:
            endings.append(step(flight, outcome))
        except BaseException as error:
            if is_interrupt(error):
                raise
            endings.append(untold(flight, error))
    return endings


def untold(flight: Flight, error: BaseException) -> Nack:
    """Return the ending of a message for which ``error`` came in the way of any other."""
    logger.error("The outcome of a handler could not be told.", exc_info=error)
    failure = Failure(f"The handler's outcome could not be told: {type(error).__name__}.")
    return Nack(flight.message, failure, UNTOLD_DELAY)


def after_timeout(interruption: BaseException | None, *flights: Flight) -> list[Ending]:
    """Return the endings of a coroutine that was interrupted because its time was up.

    Where it was then, the traceback of ``interruption`` tells.
    """
    error = TimeoutError(f"The handler took longer than its timeout of {flights[0].timeout}.")
    error.__cause__ = interruption and from_handler(interruption)
    return after_error(flights, error)


def after_interrupt(error: BaseException, *flights: Flight) -> list[Ending]:
    """Return the endings of a coroutine that ``error``, asyncio's CancelledError, has ended.

    We interrupt it when it is cancelled, when its leases are gone or its time is up. Otherwise
    the error is its own, such as that of a task that it cancelled.
    """
    now = time.monotonic()
    if any(flight.is_overdue(now) for flight in flights):
        return after_timeout(error, *flights)
    if reason := next(filter(None, (flight.stop.reason for flight in flights)), ""):
        interruption = from_handler(error)
        error = TaskCancelled(f"The handler was interrupted: {reason}.")
        error.__cause__ = interruption
    return after_error(flights, error)


def after_error(flights: Sequence[Flight], error: BaseException) -> list[Ending]:
    """Return the endings of messages whose handler raised ``error``.

    It has stopped as it was to, if any of them was asked back or is not ours any more. What a
    batch's handler had settled before has ended well, unless there is nothing else to tell it of.
    """
    suspect_sessions(error)
    from_handler(error)
    is_to_stop = any(flight.stop.is_set() for flight in flights)
    settled = [flight for flight in flights if flight.message.is_settled()]
    sunk = [flight for flight in flights if not flight.message.is_settled()]
    if not sunk:
        sunk, settled = settled[:1], settled[1:]
    step = functools.partial(_after_error, is_to_stop=is_to_stop, is_shared=len(sunk) > 1)
    # One error has one traceback, however many messages it sinks.
    told = concluded(step, sunk[:1], error)
    told += concluded(functools.partial(step, has_traceback=False), sunk[1:], error)
    return told + concluded(after_return, settled, None)


def after_return(flight: Flight, result: Any) -> Ending:
    message = flight.message
    if message.is_settled():
        _log_settled(flight)
        return Ending(message)
    if message.has_verdict():
        # Fenced like any nack: if the verdict was committed after all, the row says so.
        return _failed(flight, message.refusal or VERDICT_ROLLED_BACK)
    try:
        ending = Ack(message, kept_result(flight, result))
    except KanthorqError as error:
        return _after_error(flight, error)
    if logger.isEnabledFor(logging.INFO):  # nobody else asks whether it is late
        late = _lateness(flight)
        log_attempt(flight, logging.INFO, f"returned, but {late}" if late else "handled")
    return ending


def _lateness(flight: Flight) -> str:
    """Return why it is doubtful that the database will take the ack, if it is."""
    now = time.monotonic()
    if flight.is_expired(now) or flight.stop.reason == LEASE_OVER:
        return LEASE_OVER
    return TIME_UP if flight.is_overdue(now) else ""


def _after_error(
    flight: Flight,
    error: BaseException,
    *,
    is_to_stop: bool = False,
    is_shared: bool = False,
    has_traceback: bool = True,
) -> Ending:
    message = flight.message
    if message.is_settled():
        log_attempt(flight, logging.ERROR, "raised after it was settled", error)
        return Ending(message)
    match error:
        case Verdict():
            return _after_verdict(flight, error, is_shared=is_shared)
        case LeaseLost() | TaskCancelled() if is_to_stop:
            return _after_stop(flight, error)
    return _failed(flight, error, has_traceback=has_traceback)


def _after_verdict(flight: Flight, verdict: Verdict, *, is_shared: bool) -> Ending:
    """Return the ending that the handler asked for by raising, for several messages if shared."""
    match verdict:
        case Snooze():
            is_ours = not flight.is_cancellation or flight.subscription.cancel_handler is not None
            log_attempt(flight, logging.INFO, "snoozed" if is_ours else "was left to other code")
            return HandBack(flight.message, verdict.delay, is_snooze=True)
        case Retry():
            last = last_word(flight)
            told = f"asked to be tried again in {verdict.after}{last}"
            log_attempt(flight, logging.ERROR if last else logging.INFO, told)
            return _nack(flight.message, verdict, delay=verdict.after)
        case Discard():
            return _discarded(flight, verdict, is_shared=is_shared)
    return _failed(flight, verdict)


def _discarded(flight: Flight, verdict: Discard, *, is_shared: bool) -> Nack:
    """Return the ending of what is never to be tried again.

    Of several messages that may be meant for one alone: each is tried again, and tells for itself.
    """
    is_last = not is_shared or flight.is_last_attempt
    told = "was discarded" if is_last else "is next handled alone, its batch was discarded"
    log_attempt(flight, logging.WARNING, f"{told} by its handler: {one_line(str(verdict.reason))}")
    return _nack(flight.message, verdict, is_final=not is_shared)


def _after_stop(flight: Flight, error: BaseException) -> Ending:
    """Return the ending of what stopped because a lease is lost or was asked back."""
    if isinstance(error, LeaseLost):
        log_attempt(flight, logging.WARNING, "lost its lease, alone or with its batch; rolled back")
    else:
        why = flight.stop.reason or "another of its batch was to"
        log_attempt(flight, logging.INFO, f"stopped: {why}")
    # Of a batch only one may be meant; the others are none the worse for it. Nor is a task that
    # only its worker had no more time for.
    is_meant = flight.subscription.batch == 1 or flight.stop.is_set()
    if not is_meant or flight.stop.reason == LEAVING:
        return HandBack(flight.message, AT_ONCE)
    return _nack(flight.message, error)


def _failed(flight: Flight, reason: BaseException | str, *, has_traceback: bool = True) -> Nack:
    error = reason if isinstance(reason, BaseException) else None
    note_failure(error)
    nack = _nack(flight.message, reason)
    told = repr(reason) if error is None else type(error).__name__
    last = last_word(flight)
    is_asked = flight.stop.reason == ASKED
    then = ", cancelled as asked" if is_asked else last or f", next in {spoken(nack.delay)}"
    level = logging.ERROR if last else logging.WARNING
    log_attempt(flight, level, f"failed: {told}{then}", error if has_traceback else None)
    return nack


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


def kept_result(flight: Flight, result: Any) -> str | None:
    """Return what a handler returned, as JSON text; of what a cancellation handler did, nothing.

    Raises InvalidBody if it cannot be kept, and KanthorqError as ``_refuse_misuse()`` does.
    """
    _refuse_misuse(flight, result)
    try:
        return None if flight.is_cancellation else encode_result(result)
    except InvalidBody as error:
        raise InvalidBody(
            f"{error} What {name_of(flight.handler)} returns is kept with its task; let it return "
            "JSON, or nothing."
        ) from error


def _refuse_misuse(flight: Flight, result: Any) -> None:
    """Raise KanthorqError for what a handler should have awaited or raised, not returned."""
    if result is None:
        return
    if isinstance(result, Verdict):
        raise KanthorqError(
            f"{name_of(flight.handler)} returned {type(result).__name__}(…), which does nothing; "
            "raise it."
        )
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise KanthorqError(
            f"{name_of(flight.handler)} returned an awaitable that nobody awaits; declare it with "
            "async def."
        )


def _log_settled(flight: Flight) -> None:
    if failure := flight.message.failure:
        last = last_word(flight)
        level = logging.ERROR if last else logging.WARNING
        return log_attempt(flight, level, f"failed, as its handler says: {failure.error}{last}")
    return log_attempt(flight, logging.INFO, "handled and settled")
