"""What the log tells of an attempt: whose it was and of what, which of how many, how it ended."""

import time
from datetime import timedelta

from kanthorq_django.domain.failures import one_line
from kanthorq_django.message import ASKED, Message
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.log import logger


def log_attempt(flight: Flight, level: int, what: str, error: BaseException | None = None) -> None:
    """Log ``what`` became of an attempt, with the traceback of ``error`` if that is given."""
    if not logger.isEnabledFor(level):
        return
    message, started_at = flight.message, flight.started_at or time.monotonic()
    names, elapsed_ms = names_of(message), round((time.monotonic() - started_at) * 1_000, 3)
    logger.log(
        level,
        "%s %s: %s %d of %d for event %s %s (%.1f ms)",
        names["consumer"],
        names["subject"],
        "cleanup" if flight.is_cancellation else "attempt",
        message.attempt,
        flight.attempt_max,
        names["event_id"],
        what,
        elapsed_ms,
        exc_info=error,
        extra={
            **names,
            "attempt": message.attempt,
            "is_cancellation": flight.is_cancellation,
            "milliseconds": elapsed_ms,
        },
    )


def last_word(flight: Flight) -> str:
    """Return what to add to a failure after which there is no other attempt.

    Nothing if somebody asked to cancel the task: it is cancelled, whatever attempts are left.
    """
    is_told = flight.is_last_attempt and flight.stop.reason != ASKED
    return ", its last attempt" if is_told else ""


def spoken(delay: timedelta) -> str:
    """Return how a line of the log tells a delay, such as ``1.5 s`` or ``0:02:00``."""
    seconds = delay.total_seconds()
    is_short = delay < timedelta(minutes=1)
    return f"{seconds:.2g} s" if is_short else str(timedelta(seconds=round(seconds)))


def names_of(message: Message) -> dict[str, str]:
    """Return whose message it is and of what, as a line of the log tells it."""
    leased = message._leased
    subject = leased.subject
    return {
        "consumer": leased.consumer.name,
        "event_id": str(leased.event_id),
        # Published events have printable subjects; a role that may insert needs not publish.
        "subject": "(deleted)" if subject is None else one_line(subject),
    }
