"""Streams: named append-only sequences of events."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from django.db import connections, models, router
from django.db.models import ProtectedError
from django.utils.translation import gettext_lazy as _

from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.names import NAME_SIZE_MAX, name_problem, similar_names
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.models.fields import CreatedAtField
from kanthorq_django.models.isolation import check_read_committed, waiting_at_most

logger = logging.getLogger("kanthorq_django")

# How long a deletion waits for those who publish; all others wait behind it.
PUBLISHERS_WAIT = timedelta(seconds=10)
COMPARED_MAX = 20  # streams; of more, say one for each tenant, many have names that are alike


def check_stream_name(name: object) -> None:
    """Raise ConfigurationError if ``name`` cannot name a stream."""
    if problem := name_problem(name):
        raise ConfigurationError(f"{quoted(name)} cannot name a stream: {problem}.")


class StreamQuerySet(models.QuerySet["Stream"]):
    def register(self, name: str) -> "Stream":
        """Return the stream called ``name``, made on its first use.

        Two connections may race here: the loser waits for the winner's commit and reads
        its row. Raises ConfigurationError if ``name`` cannot name a stream.
        """
        check_stream_name(name)
        return self.get_or_create(name=name)[0]

    def register_by_event(self, name: str) -> "Stream":
        """Do the same; say so if that makes a stream whose name is nearly that of another one."""
        stream, is_new = self.get_or_create(name=name)
        if is_new:
            others = self.exclude(pk=stream.pk).values_list("name", flat=True)
            known = list(others[: COMPARED_MAX + 1])
            if len(known) <= COMPARED_MAX and (near := similar_names(name, known)):
                meant = " or ".join(map(repr, near))
                logger.warning("An event made the stream %r; was %s meant?", name, meant)
        return stream

    def bulk_create(self, objs: "Iterable[Stream]", *args: Any, **options: Any) -> Any:
        """Insert streams. Raises ConfigurationError for what cannot name one."""
        made = list(objs)
        for stream in made:
            check_stream_name(stream.name)
        return super().bulk_create(made, *args, **options)

    def update(self, **changes: Any) -> int:
        """Update these streams. Raises ConfigurationError for what cannot name one."""
        if "name" in changes and not hasattr(changes["name"], "resolve_expression"):
            check_stream_name(changes["name"])
        return super().update(**changes)

    def delete(self) -> tuple[int, dict[str, int]]:
        """Delete these streams; whoever publishes meanwhile is waited for, up to ten seconds.

        Raises ProtectedError while there are events, consumers or schedules of them.
        """
        self._for_write = True
        with _without_publishers(self.db):
            _check_unused(dict(self.values_list("pk", "name")), self.db)
            return super().delete()

    alters_data(bulk_create, update)
    alters_data(delete, queryset_only=True)


class Stream(models.Model):
    """A named append-only sequence of events."""

    name = models.CharField(_("name"), max_length=NAME_SIZE_MAX, unique=True)
    created_at = CreatedAtField()

    objects = models.Manager.from_queryset(StreamQuerySet)()

    class Meta:
        verbose_name = _("stream")
        verbose_name_plural = _("streams")

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **options: Any) -> None:
        """Insert or update this row. Raises ConfigurationError for what cannot name a stream."""
        check_stream_name(self.name)
        super().save(*args, **options)

    def delete(
        self, using: str | None = None, keep_parents: bool = False
    ) -> tuple[int, dict[str, int]]:
        """Delete this stream as the queryset's ``delete()`` does."""
        alias = using or router.db_for_write(type(self), instance=self)
        with _without_publishers(alias):
            _check_unused({self.pk: self.name}, alias)
            return super().delete(using=alias, keep_parents=keep_parents)


@contextmanager
def _without_publishers(using: str) -> Iterator[None]:
    """Run the block in a transaction in which nobody publishes, into whatever stream.

    Who publishes has looked the stream up. An event names it without a constraint, whose check
    would lock the row; so the table is locked, and whoever has not committed yet is waited for.
    Raises TransactionManagementError in an open transaction that is not READ COMMITTED.
    """
    with waiting_at_most(using, PUBLISHERS_WAIT):
        unseen = "what was published into them"
        check_read_committed(using, "deleted", what="Streams", unseen=unseen)
        with connections[using].cursor() as cursor:
            cursor.execute(f"LOCK TABLE {Stream._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        yield


def _check_unused(names: Mapping[int, str], using: str) -> None:
    """Raise ProtectedError if anything belongs to the streams, which are ``names`` by their keys.

    Django would collect all of it to find that out, while nobody can publish. What the error shows
    is read now: it may be printed where no query can be made.
    """
    for kind, *shown in (("events",), ("consumers", "name"), ("schedules", "name")):
        model: Any = Stream._meta.get_field(kind).related_model
        held = model._base_manager.using(using).filter(stream__in=names)
        for one in held.only("stream", *shown)[:1]:
            raise ProtectedError(f"Stream {names[one.stream_id]!r} has {kind}.", {one})
