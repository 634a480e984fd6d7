"""Worker processes, so that operators see who is alive. No lease depends on these rows."""

from datetime import timedelta
from typing import Self

from django.db import models
from django.db.models.functions import Now

from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.models.fields import CreatedAtField

SEEN_EVERY = timedelta(seconds=10)
DEAD_AFTER = 3 * SEEN_EVERY


class WorkerQuerySet(models.QuerySet["Worker"]):
    def alive(self) -> Self:
        """Return workers that were seen lately, by the database's clock."""
        return self.filter(seen_at__gt=Now() - DEAD_AFTER)

    def dead(self) -> Self:
        return self.exclude(seen_at__gt=Now() - DEAD_AFTER)


class Worker(models.Model):
    """One worker process; a restarted one is a new row."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    host = models.CharField(max_length=255)
    pid = models.PositiveIntegerField()
    concurrency = models.PositiveIntegerField()
    consumers = models.JSONField(default=list)
    started_at = CreatedAtField()
    seen_at = models.DateTimeField(db_default=Now(), editable=False)

    objects = models.Manager.from_queryset(WorkerQuerySet)()

    def __str__(self) -> str:
        return f"{self.pid}@{self.host}"

    def see(self) -> None:
        """Note that this worker is alive now; a row that a crash took back is written again."""
        rows = Worker.objects.using(self._state.db).filter(pk=self.pk)
        if not rows.update(seen_at=Now()):
            self.seen_at = Now()
            self.save(force_insert=True)
