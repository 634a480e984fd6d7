"""Cancelling and resuming schedules: from a ticked list, and by a button on a schedule's page."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth import get_permission_codename
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.db import router, transaction
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.functional import Promise
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_POST

from kanthorq_django.admin.readonly import GuardedAdmin
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.models import Schedule
from kanthorq_django.models.schedule import ScheduleQuerySet

NAMED_MAX = 5  # schedules left alone that a message names


class Operation(NamedTuple):
    """A verb of schedules, as a person sees it."""

    verb: str
    name: str | Promise
    effect: str | Promise
    apply: Callable[[ScheduleQuerySet], Outcome]


CANCEL = Operation(
    "cancel",
    _("Cancel"),
    _("Nothing more is published; what was published goes on normally."),
    ScheduleQuerySet.cancel,
)
RESUME = Operation(
    "resume",
    _("Resume"),
    _("It goes on from now; what passed meanwhile is left out."),
    ScheduleQuerySet.resume,
)


class SchedulingAdmin(GuardedAdmin):
    """Offers each operation to those who have the permission of that name, and to nobody else."""

    actions = ("cancel", "resume")

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "cancel")

    def has_resume_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "resume")

    @admin.action(permissions=["cancel"], description=_("Cancel selected schedules"))
    def cancel(self, request: HttpRequest, schedules: ScheduleQuerySet) -> None:
        self._operate(CANCEL, request, schedules)

    @admin.action(permissions=["resume"], description=_("Resume selected schedules"))
    def resume(self, request: HttpRequest, schedules: ScheduleQuerySet) -> None:
        self._operate(RESUME, request, schedules)

    def get_urls(self) -> list[URLPattern]:
        return [
            path(
                f"<path:object_id>/{operation.verb}/",
                self.admin_site.admin_view(require_POST(self._view_of(operation))),
                name=f"{self.opts.app_label}_{self.opts.model_name}_{operation.verb}",
            )
            for operation in (CANCEL, RESUME)
        ] + super().get_urls()

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        schedule = context["original"]
        if schedule is not None:
            operation = CANCEL if schedule.cancelled_at is None else RESUME
            if self._may(request, operation.verb):
                context["operations"] = [(operation, self._url(operation.verb, schedule.pk))]
        return super().render_change_form(request, context, *args, **kwargs)

    def _may(self, request: HttpRequest, verb: str) -> bool:
        codename = get_permission_codename(verb, self.opts)
        return self.has_view_permission(request) and request.user.has_perm(
            f"{self.opts.app_label}.{codename}"
        )

    def _operate(
        self, operation: Operation, request: HttpRequest, schedules: ScheduleQuerySet
    ) -> None:
        """Do it and log it in one transaction, and tell how many were updated or left alone."""
        try:
            with transaction.atomic(using=router.db_for_write(Schedule)):
                names = dict(schedules.values_list("pk", "name"))
                outcome = operation.apply(schedules)
                _log(operation, outcome.updated, names, request.user.pk)
        except KanthorqError as error:
            told = gettext("%(name)s: nothing was changed. %(error)s")
            text = told % {"name": operation.name, "error": error}
            self.message_user(request, text, messages.ERROR)
            return
        level = messages.WARNING if outcome.noop or not outcome.updated else messages.SUCCESS
        self.message_user(request, f"{operation.name}: {_report(outcome, names)}", level)

    def _view_of(self, operation: Operation) -> Callable[..., HttpResponse]:
        def operate(request: HttpRequest, object_id: str) -> HttpResponse:
            if not self._may(request, operation.verb):
                raise PermissionDenied
            schedule = self.get_object(request, object_id)
            if schedule is None:
                raise Http404
            self._operate(operation, request, Schedule.objects.filter(pk=schedule.pk))
            query = request.GET.urlencode()
            return HttpResponseRedirect(
                self._url("change", schedule.pk) + (f"?{query}" if query else "")
            )

        return operate

    def _url(self, page: str, schedule_id: UUID) -> str:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_{page}"
        return reverse(name, args=(schedule_id,), current_app=self.admin_site.name)


def _report(outcome: Outcome, names: dict[UUID, str]) -> str:
    updated, noop = len(outcome.updated), len(outcome.noop)
    text = ngettext("%d schedule updated", "%d schedules updated", updated) % updated
    if not noop:
        return f"{text}."
    alone = ngettext("%d left alone", "%d left alone", noop) % noop
    named = ", ".join(names.get(pk, str(pk)) for pk in outcome.noop[:NAMED_MAX])
    others = noop - NAMED_MAX
    more = ngettext(" and %d other", " and %d others", others) % others if others > 0 else ""
    return f"{text}, {alone}: {named}{more}."


def _log(
    operation: Operation, updated: Iterable[UUID], names: dict[UUID, str], user_id: Any
) -> None:
    content_type = ContentType.objects.get_for_model(Schedule)
    LogEntry.objects.bulk_create(
        LogEntry(
            user_id=user_id,
            content_type=content_type,
            object_id=str(pk),
            object_repr=names.get(pk, str(pk)),
            action_flag=CHANGE,
            change_message=operation.verb,
        )
        for pk in updated
    )
