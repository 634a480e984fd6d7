"""Every error that KanthorQ raises itself, named for the fact."""

from uuid import UUID

from django.core.exceptions import ImproperlyConfigured


class KanthorqError(Exception):
    """Base of every error below, and raised itself where none of them names the fact."""


class ConfigurationError(KanthorqError, ImproperlyConfigured):
    """A setting, a subject filter or a subscriber is declared wrongly."""


class InvalidFilter(ConfigurationError, ValueError):
    """A subject filter breaks the grammar of subjects."""


class InvalidEvent(KanthorqError, ValueError):
    """What should be published cannot be; nothing was written."""


class InvalidSubject(InvalidEvent):
    """A subject breaks the grammar: tokens of printable text, joined by dots."""


class InvalidBody(InvalidEvent):
    """A body, metadata or a result cannot be stored as JSON, or is too large."""


class IdempotencyConflict(InvalidEvent):
    """The idempotency key was used before in this stream, for a different event.

    ``event_id`` is that of the new one, which was not stored.
    """

    def __init__(self, message: str, event_id: UUID | None = None) -> None:
        super().__init__(message)
        self.event_id = event_id


class InvalidSchedule(ConfigurationError, ValueError):
    """A schedule cannot be kept: its rule, its zone or a moment of it is wrong."""


class EventIsImmutable(KanthorqError):
    """An event never changes once published."""


class UnguardedMove(KanthorqError):
    """A task's state, lease or history was assigned; only its verbs and its message move it."""


class AuditIsAppendOnly(KanthorqError):
    """What operators did is never edited, and deleted by prune alone."""


class UndecodableEvent(KanthorqError, ValueError):
    """The stored body is not JSON, or is encrypted and no key opens it."""


class MessageError(KanthorqError):
    """The message cannot be ended the way its handler asked."""


class LeaseLost(MessageError):
    """The task belongs to nobody or somebody else now; what depends on it must not commit."""


class AlreadyAcknowledged(MessageError):
    """The message was ended before: with the opposite verdict, or for good in another block."""


class CrossDatabaseAck(MessageError):
    """The open transaction is in another database than the tasks, so it cannot cover them."""


class TaskCancelled(MessageError):
    """Raised by a handler that noticed the request to cancel its task."""


class PullRefused(KanthorqError):
    """Reading the stream here could lose or repeat events, so it was not read."""


class PullInsideTransaction(PullRefused):
    """A transaction was open: its own events would be skipped for ever."""


class StandbyDatabase(PullRefused):
    """The database is a standby, whose snapshots do not tell what has committed."""


class ForeignCluster(PullRefused):
    """The consumer's cursor was written by another PostgreSQL cluster."""


class RebaseRefused(KanthorqError):
    """Cursors cannot be rebased while workers are alive, in a transaction or on a standby."""
