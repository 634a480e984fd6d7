"""What code declares about a consumer, and how the database learns of it."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import models, transaction

from kanthorq_django import sql
from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.moments import readable
from kanthorq_django.domain.names import name_problem
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.subscriptions import ATTEMPT_MAX, VISIBILITY_TIMEOUT
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.models.deletion import is_whole, without_pulls
from kanthorq_django.models.delivery.turns import Serialize, align_turns
from kanthorq_django.models.isolation import together
from kanthorq_django.models.stream import Stream

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer


def check_consumer_name(name: object) -> None:
    """Raise ConfigurationError if ``name`` cannot name a consumer."""
    if problem := name_problem(name):
        raise ConfigurationError(f"{quoted(name)} cannot name a consumer: {problem}.")


def cannot_move(consumer: str, stream: str) -> ConfigurationError:
    """Return the error to raise: a cursor says nothing of another stream."""
    return ConfigurationError(
        f"Consumer {consumer!r} reads the stream {stream!r} and cannot move to another; declare a "
        "new one."
    )


def cannot_move_to(consumer: "Consumer", declared: str) -> ConfigurationError:
    """Return the error to raise: code declares ``consumer`` for another stream than its own."""
    return ConfigurationError(
        f"Consumer {consumer.name!r} reads the stream {consumer.stream.name!r} and cannot move to "
        f"{quoted(declared)}; give the new one another name."
    )


class Registration(NamedTuple):
    """What code declares about a consumer."""

    stream: str
    includes: Sequence[str]
    excludes: Sequence[str] = ()
    attempt_max: int = ATTEMPT_MAX
    visibility_timeout: timedelta = VISIBILITY_TIMEOUT
    timeout: timedelta | None = None
    parked: bool = False
    deliver: str | datetime = "all"
    has_cancel_handler: bool = False
    cancel_attempt_max: int = ATTEMPT_MAX
    serialize: str = Serialize.OFF


# The columns that code declares, but for the stream, which never changes.
DECLARED = (
    "subject_includes",
    "subject_excludes",
    "attempt_max",
    "visibility_timeout",
    "timeout",
    "parked",
    "serialize",
    "has_cancel_handler",
    "cancel_attempt_max",
)


def changes(before: "Consumer", after: "Consumer") -> list[str]:
    """Return a line for each declared option that is another one now."""
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in DECLARED)
    return [f"{name}: {_told(old)} -> {_told(new)}" for name, old, new in pairs if old != new]


def _told(value: object) -> object:
    return "off" if value == Serialize.OFF else value


class ConsumerQuerySet(models.QuerySet["Consumer"]):
    def register(self, name: str, given: Registration) -> "Consumer":
        """Insert the consumer ``name``, or apply what changed of it, from then on.

        ``deliver`` counts for a new consumer only. Raises ConfigurationError when the
        consumer exists in another stream: its cursor belongs to that one.
        """
        check_consumer_name(name)
        self._for_write = True
        params = {
            **given._asdict(),
            "name": name,
            "subject_includes": json.dumps(list(given.includes)),
            "subject_excludes": json.dumps(list(given.excludes)),
            "from_now": given.deliver == "new",
            "deliver_from": (
                readable(given.deliver) if isinstance(given.deliver, datetime) else None
            ),
        }
        with together(self.db):
            stream = Stream.objects.using(self.db).register(given.stream)
            written = sql.rows(self.db, "register_consumer", params | {"stream_id": stream.pk})
            consumer = self.select_related("stream").get(name=name)
            if consumer.stream_id != stream.pk:  # nor is the stream made for nothing
                raise cannot_move_to(consumer, given.stream)
            if any(not row.is_new for row in written):
                align_turns(consumer)
        return consumer

    def bulk_create(
        self,
        objs: "Iterable[Consumer]",
        batch_size: int | None = None,
        ignore_conflicts: bool = False,
        update_conflicts: bool = False,
        update_fields: Collection[str] | None = None,
        unique_fields: Collection[str] | None = None,
    ) -> "list[Consumer]":
        """Insert consumers.

        Raises ConfigurationError for what cannot name one, and if one that exists would be
        changed where its cursor or its tasks had to follow.
        """
        given = list(update_fields or ())
        if fixed := [name for name in ("stream", "stream_id", "serialize") if name in given]:
            raise ConfigurationError(
                f"bulk_create() cannot change {fixed[0]!r} of consumers that exist: their cursors "
                "and tasks would not follow."
            )
        made = list(objs)
        for consumer in made:
            check_consumer_name(consumer.name)
        return super().bulk_create(
            made, batch_size, ignore_conflicts, update_conflicts, given or None, unique_fields
        )

    def update(self, **changes: Any) -> int:
        """Update these consumers; their tasks follow another rule about keys.

        Raises ConfigurationError if one would move to another stream, or for what cannot name one.
        """
        if "name" in changes and not hasattr(changes["name"], "resolve_expression"):
            check_consumer_name(changes["name"])
        if self.query.is_sliced or self.query.combinator:
            return super().update(**changes)  # which refuses a part
        if self.query.distinct_fields:
            # As Django does from 6.1 on; before, it changes also what they leave out.
            raise TypeError("Cannot call update() after .distinct(*fields).")
        self._for_write = True
        self._refuse_to_move(changes)
        if "serialize" not in changes:
            return super().update(**changes)
        with transaction.atomic(using=self.db):
            locked = self._stored().select_for_update().order_by("pk")
            pks = list(locked.values_list("pk", flat=True))
            # Not what else the query selects by now: its tasks would not follow.
            count = models.QuerySet.update(self.filter(pk__in=pks), **changes)
            self._result_cache = None
            for consumer in self.model._base_manager.using(self.db).filter(pk__in=pks):
                align_turns(consumer)
        return count

    def _refuse_to_move(self, changes: Mapping[str, Any]) -> None:
        for stream in (changes[name] for name in ("stream", "stream_id") if name in changes):
            others = self.exclude(stream=stream)
            for moved in others._stored().select_related("stream")[:1]:
                raise cannot_move(moved.name, moved.stream.name)

    def _stored(self) -> "models.QuerySet[Consumer]":
        """Return the same rows by a query of their keys: one that groups them could lock none."""
        chosen = self.distinct().order_by().values("pk")
        chosen.query.select_for_update = False  # PostgreSQL takes it with no DISTINCT
        return self.model._base_manager.using(self.db).filter(pk__in=chosen)

    def delete(self) -> tuple[int, dict[str, int]]:
        """Delete these consumers and their tasks; pulls that are under way are waited for."""
        self._for_write = True
        if not is_whole(self):
            return super().delete()  # which refuses it
        with without_pulls(self):
            return super().delete()

    alters_data(bulk_create, update)
    alters_data(delete, queryset_only=True)
