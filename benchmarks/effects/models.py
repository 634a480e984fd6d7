"""What a handler writes: one row per job, so that lost and doubled ones can be counted."""

from __future__ import annotations

from django.db import models


class Effect(models.Model):
    number = models.PositiveIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    objects: models.Manager[Effect] = models.Manager()

    def __str__(self) -> str:
        return f"effect of job {self.number}"
