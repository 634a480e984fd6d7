"""The row of an event, inserted without KanthorQ: by bare psycopg, or by Django's ORM."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import psycopg

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, body, dsn, main

django_app.set_up()

from django.db import models  # noqa: E402  # after the apps are loaded

from kanthorq_django.domain.identifiers import uuid7  # noqa: E402
from kanthorq_django.models import Event, Stream  # noqa: E402

INSERT = """
    INSERT INTO kanthorq_django_event (
        id, stream_id, subject, body, metadata, resource_key, idempotency_key, schedule_at
    ) VALUES (%s, %s, %s, %s, %s::jsonb, %s, %s, %s)
"""


class Row(models.Model):
    """An event as Django alone would store it."""

    id = models.UUIDField(primary_key=True, default=uuid7)
    stream_id = models.BigIntegerField()
    xid = Event._meta.get_field("xid").clone()
    subject = models.CharField(max_length=255)
    body = models.BinaryField()
    metadata = models.JSONField(default=dict)
    resource_key = models.CharField(max_length=255, default="", blank=True)
    idempotency_key = models.CharField(max_length=255, null=True)  # noqa: DJ001  # as Event's
    schedule_at = models.DateTimeField(null=True)
    created_at = Event._meta.get_field("created_at").clone()

    objects: models.Manager[Row] = models.Manager()

    class Meta:
        app_label = "effects"
        managed = False
        db_table = Event._meta.db_table

    def __str__(self) -> str:
        return str(self.pk)


class BareAdapter(Adapter):
    def install(self) -> None:
        django_app.create_tables()

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        raise NotImplementedError

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        {"warm": self._by_both, "orm": self._by_orm, "psycopg": self._by_psycopg}[job](numbers)

    @functools.cached_property
    def _stream(self) -> int:
        stream, _ = Stream.objects.get_or_create(name="noop")
        return stream.pk

    @functools.cached_property
    def _connection(self) -> psycopg.Connection:
        return psycopg.connect(dsn(), autocommit=True)

    def _by_both(self, numbers: Iterable[int]) -> None:
        self._by_orm(numbers)
        self._by_psycopg(numbers)

    def _by_psycopg(self, numbers: Iterable[int]) -> None:
        with self._connection.cursor() as cursor:
            for number in numbers:
                row = (uuid7(), self._stream, "noop", body(number), "{}", "", None, None)
                cursor.execute(INSERT, row)

    def _by_orm(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            Row.objects.create(stream_id=self._stream, subject="noop", body=body(number))


if __name__ == "__main__":
    main(BareAdapter())
