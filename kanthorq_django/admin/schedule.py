"""Schedules: written by people or by code, and looked at before they occur."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.contrib.humanize.templatetags.humanize import naturaltime
from django.db import router
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.template.defaultfilters import filesizeformat
from django.template.loader import render_to_string
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin import content
from kanthorq_django.admin.display import NOTHING, badge, exact_moment, moment, preformatted
from kanthorq_django.admin.event import body_text
from kanthorq_django.admin.links import links_of
from kanthorq_django.admin.orders import order_of
from kanthorq_django.admin.readonly import RelatedFilter
from kanthorq_django.admin.schedule_actions import ScheduleActionsAdmin, record
from kanthorq_django.admin.schedule_form import ScheduleForm, json_problem, strays
from kanthorq_django.exceptions import UndecodableEvent
from kanthorq_django.models import Schedule, Stream
from kanthorq_django.models.scheduling.definition import TIMING, readable_exdates

LIVES = {
    "active": (_("Active"), "alive"),
    "cancelled": (_("Cancelled"), "cancelled"),
    "ended": (_("Ended"), "gone"),
}
# The audit is never edited: a secret in it would stay. Other columns are redacted when shown.
UNTOLD = frozenset({"body", "metadata"})
BODIES = ("body_text", "body_withheld")


class LifeFilter(admin.SimpleListFilter):
    """Ended is what has no next occurrence although nobody cancelled it."""

    title = _("state")
    parameter_name = "life"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [(life, name) for life, (name, _kind) in LIVES.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        conditions = {
            "active": Q(cancelled_at=None, next_at__isnull=False),
            "cancelled": Q(cancelled_at__isnull=False),
            "ended": Q(cancelled_at=None, next_at=None),
        }
        wanted = conditions.get(self.value() or "")
        return None if wanted is None else queryset.filter(wanted)


class ScheduleList(ChangeList):
    """A page of schedules without what makes them wide."""

    def get_queryset(self, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        return super().get_queryset(*args, **kwargs).defer("body", "metadata")


@admin.register(Schedule)
class ScheduleAdmin(ScheduleActionsAdmin):
    """What code declares can be changed here too, until code declares it anew."""

    form = ScheduleForm
    list_display = ("name", "rule", "next_occurrence", "last_occurrence", "life", "stream_link")
    list_filter = (LifeFilter, ("stream", RelatedFilter))
    ordering = ("name",)
    sortable_by = ("name",)
    search_fields = ("name", "subject")
    radio_fields = {"catchup": admin.VERTICAL}
    readonly_fields = (
        "life",
        "rule",
        "occurrences",
        "last_exactly",
        "cancelled",
        "created",
        "stream_link",
        "metadata_text",
        "starts",
        "left_out",
        *BODIES,
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        schedules: QuerySet[Any] = super().get_queryset(request).select_related("stream")
        return schedules

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return ScheduleList

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        """Add the body where it is no text, or hidden, so that the form leaves it alone."""
        own = tuple(super().get_readonly_fields(request, obj))
        return own if self._writes_body(request, obj) else (*own, "body")

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        shown = "body_text" if self._may_see_body(request) else "body_withheld"
        if obj is not None and not self.has_change_permission(request, obj):
            published = ("name", "stream_link", "subject", shown, "metadata_text", "resource_key")
            timed: tuple[str, ...] = ("rrule", "starts", "timezone", "left_out", "catchup")
        else:
            body = "body" if self._writes_body(request, obj) else shown
            published = ("name", "stream", "subject", body, "metadata", "resource_key")
            timed = ("rrule", "dtstart", "timezone", "exdates", "catchup")
        told = ("life", "rule", "occurrences", "last_exactly", "cancelled", "created")
        return (
            *(((_("Occurrences"), {"fields": told}),) if obj is not None else ()),
            (_("What is published"), {"fields": published}),
            (_("When"), {"fields": timed}),
        )

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Settle when it occurs next, and write only what was changed: workers write the rest."""
        if change:
            stored = Schedule.objects.using(router.db_for_write(Schedule))
            locked = stored.select_for_update(of=("self",), no_key=True)
            kept = get_object_or_404(locked, pk=obj.pk)
            changed = set(form.changed_data)
            fields = {name: _change_of(name, kept, obj) for name in sorted(changed)}
            order = order_of(request, schedule=kept.name, fields=fields)
            record(order, "change", [kept.name], fields=len(changed))
            # In another zone the same local times are other moments.
            columns = changed if changed.isdisjoint(TIMING) else changed | TIMING
            kept.redefine({name: getattr(obj, name) for name in columns})
        else:
            kept = obj
            obj.save()
            record(order_of(request, schedule=obj.name), "add", [obj.name], added=1)
        for text in _doubts(kept, form.changed_data):
            self.message_user(request, text, messages.WARNING)

    @admin.display(description=_("state"))
    def life(self, schedule: Schedule) -> str:
        return badge(*LIVES[_stored(schedule).life])

    @admin.display(description=_("rule"))
    def rule(self, schedule: Schedule) -> str:
        kept = _stored(schedule)
        return format_html("{} <code>{}</code>", kept.in_words(), kept.timezone)

    @admin.display(description=_("next"))
    def next_occurrence(self, schedule: Schedule) -> str:
        return moment(schedule.next_at)

    @admin.display(description=_("last"))
    def last_occurrence(self, schedule: Schedule) -> str:
        return moment(schedule.last_at)

    @admin.display(description=_("next occurrences"))
    def occurrences(self, schedule: Schedule) -> str:
        kept = _stored(schedule)
        moments = [_local(kept, upcoming) for upcoming in kept.upcoming()]
        reasons = {
            "active": gettext("The rule cannot be read any more."),
            "cancelled": gettext("None: it is cancelled."),
            "ended": gettext("None: the rule has ended."),
        }
        context = {"moments": moments, "reason": reasons[kept.life]}
        return render_to_string("admin/kanthorq_django/schedule/occurrences.html", context)

    @admin.display(description=_("last occurrence"))
    def last_exactly(self, schedule: Schedule) -> str:
        kept = _stored(schedule)
        return NOTHING if kept.last_at is None else _local(kept, kept.last_at)

    @admin.display(description=_("cancelled"))
    def cancelled(self, schedule: Schedule) -> str:
        return exact_moment(schedule.cancelled_at)

    @admin.display(description=_("created"))
    def created(self, schedule: Schedule) -> str:
        return exact_moment(schedule.created_at)

    @admin.display(description=_("stream"))
    def stream_link(self, schedule: Schedule) -> str:
        return links_of(schedule).to_row(Stream, schedule.stream_id, schedule.stream.name)

    @admin.display(description=_("starts at"))
    def starts(self, schedule: Schedule) -> str:
        return _local(schedule, schedule.dtstart)

    @admin.display(description=_("left out"))
    def left_out(self, schedule: Schedule) -> str:
        moments = [_local(schedule, left_out) for left_out in readable_exdates(schedule)]
        context = {"moments": moments, "reason": NOTHING}
        return render_to_string("admin/kanthorq_django/schedule/occurrences.html", context)

    @admin.display(description=_("metadata"))
    def metadata_text(self, schedule: Schedule) -> str:
        return preformatted(content.pretty_value(schedule.metadata))

    @admin.display(description=_("body"))
    def body_text(self, schedule: Schedule) -> str:
        return body_text(schedule)

    @admin.display(description=_("body"))
    def body_withheld(self, schedule: Schedule) -> str:
        body = _body(schedule)
        size = NOTHING if body is None else filesizeformat(len(body))
        return gettext("%(size)s; you may not see it.") % {"size": size}

    def _may_see_body(self, request: HttpRequest) -> bool:
        return request.user.has_perm("kanthorq_django.view_body")

    def _writes_body(self, request: HttpRequest, obj: Any) -> bool:
        """Tell whether the body is a field of the form: a new one, or text that may be seen."""
        return obj is None or (self._may_see_body(request) and _is_text(_body(obj)))


def _change_of(name: str, kept: Schedule, given: Schedule) -> Any:
    """Return what the audit tells of a column; the list of them is bounded, and so are values."""
    if name in UNTOLD:
        return "not kept here"
    return {"old": getattr(kept, name), "new": getattr(given, name)}


def _stored(schedule: Any) -> Schedule:
    """Return ``schedule`` without what a form that is wrong has put into it."""
    return getattr(schedule, "as_stored", schedule)  # type: ignore[no-any-return]  # a Schedule


def _body(schedule: Schedule) -> bytes | None:
    """Return the body, or None where no key opens it."""
    try:
        return bytes(schedule.body)
    except UndecodableEvent:
        return None


def _is_text(body: bytes | None) -> bool:
    return body is not None and content.describe(body, len(body)).kind != "hex"


def _local(schedule: Schedule, when: datetime) -> str:
    """Return ``when`` in words by the clocks of the schedule's zone, and how far away it is."""
    local = schedule.local(when)
    # Translators: a format as of Django's template filter "date".
    told = date_format(local, gettext("l j F Y, H:i:s"))
    text = f"{told} {local.tzname()}"
    return format_html(
        '<time datetime="{}">{}</time> ({})', local.isoformat(), text, naturaltime(when)
    )


def _doubts(schedule: Schedule, changed: Iterable[str]) -> Iterable[str]:
    """Yield what is allowed, and most likely not meant."""
    if schedule.life == "ended":
        yield gettext("The rule has no further occurrence.")
    if "body" in changed and (problem := json_problem(bytes(schedule.body))):
        yield gettext("The body looks like JSON and is none: %s.") % problem
    if "exdates" in changed and (named := ", ".join(strays(schedule))):
        yield gettext("No occurrences, so leaving them out changes nothing: %s.") % named
