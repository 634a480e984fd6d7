"""Rotation: putting stored bodies under the first key, in transactions too short to be in the way.

Events never change, and neither does what their bodies say: only how it is stored.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self
from uuid import UUID

from django.db import connections, models, transaction

from kanthorq_django.conf import get_settings
from kanthorq_django.exceptions import ConfigurationError, UndecodableEvent
from kanthorq_django.models.audit import Order
from kanthorq_django.models.event import Event
from kanthorq_django.models.publishing.encryption import (
    fernet,
    is_sealed,
    is_sealed_with,
    seal,
    unseal,
)
from kanthorq_django.models.schedule import Schedule
from kanthorq_django.sql.binding import Statement
from kanthorq_django.sql.round_trip import run

BATCH = 100  # bodies in memory at a time, and in one transaction
BATCH_MAX = 10_000
LOST_SHOWN = 5  # bodies that no key opens which are named
FIRST = UUID(int=0)

_SAVEPOINT = Statement("SAVEPOINT kanthorq_body;")
_RELEASE = Statement("RELEASE SAVEPOINT kanthorq_body;")


class Reencrypted(NamedTuple):
    """How many bodies were read, stored anew, left as somebody had them locked, and lost.

    ``named`` are the ids of some of the lost ones, which no key opens.
    """

    read: int = 0
    changed: int = 0
    left: int = 0
    lost: int = 0
    named: tuple[UUID, ...] = ()

    def plus(self, other: Self) -> Self:
        return type(self)(
            self.read + other.read,
            self.changed + other.changed,
            self.left + other.left,
            self.lost + other.lost,
            (self.named + other.named)[:LOST_SHOWN],
        )


def reencrypt(
    using: str,
    *,
    decrypt: bool = False,
    dry_run: bool = False,
    batch: int = BATCH,
    order: Order | None = None,
    on_batch: Callable[[Reencrypted], None] | None = None,
) -> Reencrypted:
    """Seal all bodies of events and schedules with the first key; with ``decrypt``, open them all.

    Each ``batch`` is a transaction of its own, recorded with an operator's ``order``; a second
    run finds nothing to do. Raises ConfigurationError without keys.
    """
    if not get_settings().BODY_KEYS:
        raise ConfigurationError("KANTHORQ['BODY_KEYS'] is empty: there is no key to work with.")
    fernet(get_settings().BODY_KEYS)
    total = Reencrypted()
    for model in (Event, Schedule):
        rotation = _Rotation(model._base_manager.using(using).all(), decrypt, batch)
        for page in rotation.pages():
            total = total.plus(rotation.forecast(page) if dry_run else rotation.turn(page, order))
            if on_batch is not None:
                on_batch(total)
    return total


class _Rotation(NamedTuple):
    """Goes through one table by its ids."""

    rows: models.QuerySet[Any]
    decrypt: bool
    batch: int

    def pages(self) -> Iterator[dict[UUID, bytes]]:
        """Yield stored bodies by id; nothing is locked while they are decrypted."""
        after = FIRST
        while True:
            stored = self.rows.filter(pk__gt=after).order_by("pk").values_list("pk", "body")
            page = {pk: bytes(body) for pk, body in stored[: self.batch]}
            yield page
            if len(page) < self.batch:
                return
            after = max(page)

    def forecast(self, page: dict[UUID, bytes]) -> Reencrypted:
        renewed, lost = self._renewed(page)
        return Reencrypted(len(page), len(renewed), 0, len(lost), tuple(lost[:LOST_SHOWN]))

    def turn(self, page: dict[UUID, bytes], order: Order | None) -> Reencrypted:
        """Store anew what has to be; what others have locked, as prune has, is left to a later run.

        Nothing here waits for a lock, so nothing here can deadlock.
        """
        renewed, lost = self._renewed(page)
        changed: list[UUID] = []
        if renewed:
            using = self.rows.db
            with transaction.atomic(using=using):
                wanted = self.rows.filter(pk__in=list(renewed)).order_by("pk")
                locked = wanted.select_for_update(of=("self",), no_key=True, skip_locked=True)
                pks = list(locked.values_list("pk", flat=True))
                changed = [pk for pk in pks if self._store(pk, page[pk], renewed[pk])]
                if order is not None:
                    counts = {"changed": len(changed)}
                    order.record("events.reencrypt", using=using, counts=counts, ids=changed)
        left = len(renewed) - len(changed)
        return Reencrypted(len(page), len(changed), left, len(lost), tuple(lost[:LOST_SHOWN]))

    def _store(self, pk: UUID, before: bytes, body: bytes) -> bool:
        """Store ``body``, in one round trip; return False if it has changed since.

        In a savepoint, which gives each row an xmin of its own: rebase takes rows of several
        transactions with one xmin for restored ones.
        """
        table = self.rows.model._meta.db_table
        update = (
            f"UPDATE {table} SET body = %(body)s "  # noqa: S608  # a name of ours
            "WHERE id = %(id)s AND body = %(before)s;"
        )
        statements = (_SAVEPOINT, Statement(update, is_repeated=True), _RELEASE)
        params = {"id": pk, "before": before, "body": body}
        _, updated, _ = run(connections[self.rows.db], statements, params)
        return bool(updated.command_tuples)

    def _renewed(self, page: dict[UUID, bytes]) -> tuple[dict[UUID, bytes], list[UUID]]:
        """Return what is to be stored instead, by id, and the ids that no key opens."""
        renewed, lost = {}, []
        for pk, stored in page.items():
            try:
                if not self._is_current(stored):
                    plain = unseal(pk, stored)
                    renewed[pk] = plain if self.decrypt else seal(pk, plain)
            except UndecodableEvent:
                lost.append(pk)
        return renewed, lost

    def _is_current(self, stored: bytes) -> bool:
        if self.decrypt:
            return not is_sealed(stored)
        return is_sealed_with(get_settings().BODY_KEYS[0], stored)
