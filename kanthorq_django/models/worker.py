"""Worker processes, so that operators see who is alive. No lease waits for these rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

from django.db import OperationalError, connections, models, transaction
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _
from psycopg.errors import LockNotAvailable

from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.models.fields import CreatedAtField

SEEN_EVERY = timedelta(seconds=10)
DEAD_AFTER = 3 * SEEN_EVERY


class WorkerQuerySet(models.QuerySet["Worker"]):
    def alive(self) -> Self:
        """Return workers that were seen lately, by the database's clock."""
        return self.filter(seen_at__gt=Now() - DEAD_AFTER)

    def dead(self) -> Self:
        """Return workers that were not seen lately: they died without a word, or hang."""
        return self.exclude(seen_at__gt=Now() - DEAD_AFTER)


class Worker(models.Model):
    """One worker process; a restarted one is a new row."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    host = models.CharField(_("host"), max_length=255)
    pid = models.PositiveIntegerField()
    concurrency = models.PositiveIntegerField(_("concurrency"))
    consumers = models.JSONField(default=list)
    started_at = CreatedAtField()
    seen_at = models.DateTimeField(db_default=Now(), editable=False)

    objects = models.Manager.from_queryset(WorkerQuerySet)()

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")

    def __str__(self) -> str:
        return f"{self.pid}@{self.host}"

    def see(self) -> None:
        """Note that this worker is alive now; a row that a crash took back is written again.

        Where somebody has locked it, it is noted the next time.
        """
        rows = Worker.objects.using(self._state.db).filter(pk=self.pk)
        try:
            with _impatient(rows.db):
                if not rows.update(seen_at=Now()):
                    self.seen_at = Now()
                    self.save(force_insert=True)
        except OperationalError as error:
            if not isinstance(error.__cause__, LockNotAvailable):
                raise

    def sign_out(self) -> None:
        """Delete the row. Raises OperationalError where somebody has locked it."""
        rows = Worker.objects.using(self._state.db).filter(pk=self.pk)
        with _impatient(rows.db):
            rows.delete()


@contextmanager
def _impatient(using: str) -> Iterator[None]:
    """Run the block in a transaction that waits for no lock.

    Raises OperationalError instead: the worker's renewals, and its end, would wait as well.
    """
    with transaction.atomic(using=using):
        with connections[using].cursor() as cursor:
            cursor.execute("SET LOCAL lock_timeout = '100ms'")
        yield
