"""Cancelling and resuming schedules: from a ticked list, and by a button on a schedule's page."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import router
from django.http import HttpRequest
from django.utils.functional import Promise
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.buttons import ButtonsAdmin
from kanthorq_django.admin.display import disclosed, number
from kanthorq_django.admin.orders import ReasonedActionForm, order_of, order_on_list
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.models import Schedule
from kanthorq_django.models.audit import SAMPLE_SIZE, Order
from kanthorq_django.models.isolation import together
from kanthorq_django.models.schedule import ScheduleQuerySet


class Operation(NamedTuple):
    """A verb of schedules, as a person sees it; above a form, "Cancel" would mean to leave it."""

    verb: str
    name: str | Promise
    button: str | Promise
    effect: str | Promise
    apply: Callable[[ScheduleQuerySet], Outcome]

    @property
    def action(self) -> str:
        return self.verb


CANCEL = Operation(
    "cancel",
    _("Cancel"),
    _("Stop this schedule"),
    _("It is cancelled: nothing more is published; what was published goes on normally."),
    ScheduleQuerySet.cancel,
)
RESUME = Operation(
    "resume",
    _("Resume"),
    _("Resume this schedule"),
    _("It goes on from now; what passed meanwhile is left out."),
    ScheduleQuerySet.resume,
)


class ScheduleActionsAdmin(ButtonsAdmin):
    """Offers each operation to those who have the permission of that name, and to nobody else."""

    operations = (CANCEL, RESUME)
    actions = ("cancel", "resume")
    action_form = ReasonedActionForm

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "cancel")

    def has_resume_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "resume")

    @admin.action(permissions=["cancel"], description=_("Cancel selected schedules"))
    def cancel(self, request: HttpRequest, schedules: ScheduleQuerySet) -> None:
        self._operate(CANCEL, request, schedules, order_on_list(request))

    @admin.action(permissions=["resume"], description=_("Resume selected schedules"))
    def resume(self, request: HttpRequest, schedules: ScheduleQuerySet) -> None:
        self._operate(RESUME, request, schedules, order_on_list(request))

    def offered(self, row: Schedule) -> Iterable[Operation]:
        return [CANCEL if row.cancelled_at is None else RESUME]

    def operate_on(self, row: Schedule, operation: Operation, request: HttpRequest) -> None:
        chosen = Schedule.objects.using(_using()).filter(pk=row.pk)
        self._operate(operation, request, chosen, order_of(request, schedule=row.name))

    def delete_model(self, request: HttpRequest, obj: Schedule) -> None:
        record(order_of(request, schedule=obj.name), "delete", [obj.name], deleted=1)
        super().delete_model(request, obj)

    def delete_queryset(self, request: HttpRequest, queryset: Any) -> None:
        """Delete the ticked ones, and record which, in one transaction."""
        with together(_using()):
            locked = _locked(queryset)
            names = list(locked.values_list("name", flat=True))
            record(order_on_list(request), "delete", names, deleted=len(names))
            super().delete_queryset(request, locked)

    def _operate(
        self,
        operation: Operation,
        request: HttpRequest,
        schedules: ScheduleQuerySet,
        order: Order,
    ) -> None:
        """Do it and log it in one transaction, and tell how many were updated or left alone."""
        try:
            with together(_using()):
                locked = _locked(schedules)
                names = dict(locked.values_list("pk", "name"))
                outcome = operation.apply(locked)
                _log(operation, outcome.updated, names, order)
                changed = [names[pk] for pk in outcome.updated]
                counts = {"updated": len(changed), "noop": len(outcome.noop)}
                record(order, operation.verb, changed, **counts)
        except KanthorqError as error:
            told = gettext("%(name)s: nothing was changed. %(error)s")
            text = told % {"name": operation.name, "error": error}
            self.message_user(request, text, messages.ERROR)
            return
        level = messages.WARNING if outcome.noop or not outcome.updated else messages.SUCCESS
        told = format_html("{}: {} {}", operation.name, _counted(outcome), _by_name(outcome, names))
        self.message_user(request, told, level)


def record(order: Order, verb: str, names: Iterable[str], **counts: int) -> None:
    """Write into the audit what becomes of the schedules called ``names``."""
    order.record(f"schedules.{verb}", using=_using(), counts=counts, ids=names)


def _locked(schedules: ScheduleQuerySet) -> ScheduleQuerySet:
    """Return those of ``schedules`` that there are now, and that nobody can change meanwhile.

    Asked anew, a filter may select others than were told of.
    """
    rows = Schedule.objects.using(_using()).filter(pk__in=schedules.order_by().values("pk"))
    locked = rows.select_for_update(of=("self",), no_key=True).order_by("pk")
    return schedules.filter(pk__in=list(locked.values_list("pk", flat=True)))


def _using() -> str:
    return router.db_for_write(Schedule)


def _counted(outcome: Outcome) -> str:
    updated, noop = len(outcome.updated), len(outcome.noop)
    text = ngettext("%s schedule updated", "%s schedules updated", updated) % number(updated)
    if noop:
        text += ", " + ngettext("%s left alone", "%s left alone", noop) % number(noop)
    return f"{text}."


def _by_name(outcome: Outcome, names: dict[UUID, str]) -> SafeString:
    return _disclosed(gettext("Left alone:"), outcome.noop, names) + _disclosed(
        gettext("Changed:"), outcome.updated, names
    )


def _disclosed(title: str, pks: Sequence[UUID], names: dict[UUID, str]) -> SafeString:
    return disclosed(title, [names.get(pk, str(pk)) for pk in pks[:SAMPLE_SIZE]], len(pks))


def _log(
    operation: Operation, updated: Iterable[UUID], names: dict[UUID, str], order: Order
) -> None:
    content_type = ContentType.objects.get_for_model(Schedule)
    LogEntry.objects.bulk_create(
        LogEntry(
            user_id=order.user_id,
            content_type=content_type,
            object_id=str(pk),
            object_repr=names.get(pk, str(pk)),
            action_flag=CHANGE,
            change_message=order.told(operation.verb),
        )
        for pk in updated
    )
