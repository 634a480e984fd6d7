"""One row per effect, so that lost and doubled effects can be counted."""

from django.db import models


class Entry(models.Model):
    """An effect of handling ``event_id``; nothing stops a second one, so that tests can see it."""

    event_id = models.UUIDField(db_index=True)
    note = models.CharField(max_length=200, blank=True)

    class Meta:
        app_label = "ledger"

    def __str__(self) -> str:
        return f"{self.event_id} {self.note}"
