"""The audit: what operators changed, written in the transaction that changes it.

A row is inserted with the change or not at all, and never changes afterwards. Only prune
deletes rows, those older than ``KANTHORQ["AUDIT_RETENTION"]``.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

from django.db import connections, models, transaction
from django.db.models.functions import Now
from django.db.transaction import TransactionManagementError
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.failures import one_line
from kanthorq_django.exceptions import AuditIsAppendOnly
from kanthorq_django.models.fields import CreatedAtField

SAMPLE_SIZE = 20  # ids, and values of one part of a selection, that a row keeps
TEXT_SIZE_MAX = 200  # characters of one value of a selection
REASON_SIZE_MAX = 500
NAME_SIZE_MAX = 255
BATCH = 1_000  # rows that one transaction prunes


class OperatorActionQuerySet(models.QuerySet["OperatorAction"]):
    def past(self, retention: timedelta) -> Self:
        """Return rows that are older than ``retention``, by the database's clock."""
        return self.filter(created_at__lt=Now() - retention)

    def prune(self, older_than: timedelta) -> int:
        """Delete rows that are older, batch by batch; return how many. Nothing else deletes any."""
        self._for_write = True
        old = self.past(older_than).order_by("pk")
        count = 0
        while True:
            with transaction.atomic(using=self.db):
                pks = list(old.values_list("pk", flat=True)[:BATCH])
                self.filter(pk__in=pks)._raw_delete(self.db)
            count += len(pks)
            if len(pks) < BATCH:
                return count

    def bulk_create(
        self,
        objs: "Iterable[OperatorAction]",
        batch_size: int | None = None,
        ignore_conflicts: bool = False,
        update_conflicts: bool = False,
        *args: Any,
        **options: Any,
    ) -> "list[OperatorAction]":
        """Insert rows. Raises AuditIsAppendOnly if one that exists would be changed."""
        if update_conflicts:
            raise AuditIsAppendOnly("What operators did is never edited.")
        return super().bulk_create(objs, batch_size, ignore_conflicts, False, *args, **options)

    def update(self, *_: Any, **__: Any) -> int:
        """Raise AuditIsAppendOnly."""
        raise AuditIsAppendOnly("What operators did is never edited.")

    def delete(self) -> Any:
        """Raise AuditIsAppendOnly; ``prune()`` deletes what is old enough."""
        raise AuditIsAppendOnly("What operators did is kept until prune finds it old enough.")

    bulk_update = update

    alters_data(prune, bulk_create, update)
    alters_data(delete, queryset_only=True)  # as Django's own


class OperatorAction(models.Model):
    """Who changed what, when by the database's clock, on which selection, and why."""

    class Origin(models.TextChoices):
        ADMIN = "admin", _("admin")
        COMMAND = "command", _("command line")

    created_at = CreatedAtField()
    # A user name, or user@host of a shell.
    operator = models.CharField(_("operator"), max_length=NAME_SIZE_MAX)
    user_id = models.CharField(max_length=NAME_SIZE_MAX, blank=True, default="")
    origin = models.CharField(_("origin"), max_length=7, choices=Origin.choices)
    action = models.CharField(_("action"), max_length=40)  # such as tasks.cancel
    selection = models.JSONField(default=dict)
    counts = models.JSONField(default=dict)
    reason = models.CharField(max_length=REASON_SIZE_MAX, blank=True, default="")
    sample = models.JSONField(default=list)  # ids of what was changed, the first few

    objects = models.Manager.from_queryset(OperatorActionQuerySet)()

    class Meta:
        verbose_name = _("operator action")
        verbose_name_plural = _("operator actions")
        default_permissions = ("view",)
        indexes = [models.Index(fields=["created_at"], name="kanthorq_audit_created")]

    def __str__(self) -> str:
        told = {"action": self.action, "operator": self.operator}
        return gettext("%(action)s by %(operator)s") % told

    def save(self, **options: Any) -> None:
        """Insert this row. Raises AuditIsAppendOnly if it is stored."""
        if not self._state.adding:
            raise AuditIsAppendOnly("What operators did is never edited.")
        # Django would update the row that has the key of this one.
        super().save(**options | {"force_insert": True})

    def delete(self, *_: Any, **__: Any) -> Any:
        """Raise AuditIsAppendOnly; ``prune()`` deletes what is old enough."""
        raise AuditIsAppendOnly("What operators did is kept until prune finds it old enough.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an operator asks for: who and from where, on which selection, and why."""

    operator: str
    origin: OperatorAction.Origin
    user_id: str = ""
    selection: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def told(self, change: str) -> str:
        """Return ``change`` with the reason, if one was given, in a line."""
        reason = one_line(self.reason, REASON_SIZE_MAX)
        return f"{change}: {reason}" if reason else change

    def record(
        self, action: str, *, using: str, counts: Mapping[str, int], ids: Iterable[object] = ()
    ) -> None:
        """Write what was done into the open transaction; nothing, if all it did was noop.

        Raises TransactionManagementError outside a transaction: the row must stand or fall
        with the change.
        """
        if not connections[using].in_atomic_block:
            raise TransactionManagementError("What is recorded has to be part of a transaction.")
        if not any(count for word, count in counts.items() if word != "noop"):
            return
        OperatorAction.objects.using(using).create(
            operator=one_line(self.operator, NAME_SIZE_MAX),
            user_id=self.user_id,
            origin=self.origin,
            action=action,
            selection=_bounded(self.selection),
            counts=dict(counts),
            reason=one_line(self.reason, REASON_SIZE_MAX),
            sample=[str(given) for given in itertools.islice(ids, SAMPLE_SIZE)],
        )


def _bounded(value: Any) -> Any:
    """Return ``value`` as JSON takes it, with long texts and lists cut."""
    if isinstance(value, Mapping):
        return {
            one_line(str(key), TEXT_SIZE_MAX): _bounded(value[key])
            for key in itertools.islice(value, SAMPLE_SIZE)
        }
    if isinstance(value, list | tuple):
        others = len(value) - SAMPLE_SIZE
        kept = [_bounded(each) for each in value[:SAMPLE_SIZE]]
        return [*kept, f"and {others} more"] if others > 0 else kept
    if value is None or isinstance(value, bool | int):
        return value
    return one_line(str(value), TEXT_SIZE_MAX)
