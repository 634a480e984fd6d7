"""Events: read, never changed; bodies only for those who may see them."""

from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.db import DEFAULT_DB_ALIAS, connections, router
from django.db.models import BinaryField, F, Func, IntegerField, QuerySet, Value
from django.http import HttpRequest, HttpResponse
from django.template.defaultfilters import filesizeformat
from django.template.loader import render_to_string
from django.utils.html import format_html
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django import signals, sql
from kanthorq_django.admin import content
from kanthorq_django.admin.display import (
    NOTHING,
    exact_moment,
    moment,
    number,
    preformatted,
    visible,
)
from kanthorq_django.admin.due import task_badge, with_is_due
from kanthorq_django.admin.links import links_of
from kanthorq_django.admin.orders import order_of
from kanthorq_django.admin.readonly import ReadOnlyAdmin, RelatedFilter
from kanthorq_django.domain.subjects import SUBJECT_SIZE_MAX
from kanthorq_django.exceptions import UndecodableEvent
from kanthorq_django.models import Consumer, Event, Schedule, Stream, Task
from kanthorq_django.models.isolation import check_read_committed, together
from kanthorq_django.models.publishing.encryption import is_sealed

AT_ONCE = timedelta(0)
KINDS = {
    "json": _("JSON"),
    "text": _("text"),
    "hex": _("binary, in hexadecimal"),
    "empty": _("empty"),
}


class EventList(ChangeList):
    """A page of events without what makes them wide."""

    def get_queryset(self, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        return super().get_queryset(*args, **kwargs).defer("body", "metadata")


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    """What was published. The body is shown to those with the permission ``view_body`` alone."""

    list_display = ("name", "stream_link", "resource_key_text", "size", "created")
    list_filter = (("stream", RelatedFilter),)
    sortable_by = ("created",)
    search_fields = ("subject",)  # get_search_results() says what is searched
    # No index leads to an event's resource key; one leads to those of tasks.
    search_help_text = _(
        "An event id, or the beginning of a subject. Resource keys are searched among tasks."
    )
    labels: ClassVar = {"id": _("ID"), "xid": _("transaction ID")}
    help_texts: ClassVar = {
        "xid": _("The transaction of PostgreSQL that published it; consumers read in this order."),
    }

    def has_view_body_permission(self, request: HttpRequest) -> bool:
        """Tell whether the user may see what events carry, not only how much."""
        return request.user.has_perm("kanthorq_django.view_body")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Allow it only for an event that everybody is done with, as ``kanthorq prune`` does."""
        if not request.user.has_perm("kanthorq_django.delete_event"):
            return False
        # Without a row, Django asks whether to offer the deletion of all that are ticked.
        return obj is not None and _task_count_if_spent(obj) is not None

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return _with_size(super().get_queryset(request).select_related("stream").defer("body"))

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return EventList

    def get_ordering(self, request: HttpRequest) -> tuple[str, ...]:
        # Newest first by an index: the primary key's, or within a stream the pull's.
        return ("-xid", "-id") if "stream__id__exact" in request.GET else ("-id",)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return _found(queryset, search_term.strip()), False

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        body = "body_text" if self.has_view_body_permission(request) else "body_withheld"
        may_view_tasks = request.user.has_perm("kanthorq_django.view_task")
        return (
            (None, {"fields": ("subject", "stream_link", "resource_key_text", "metadata_text")}),
            (_("Body"), {"fields": (body,)}),
            *(((_("Tasks"), {"fields": ("tasks",)}),) if may_view_tasks else ()),
            (_("Record"), {"fields": ("id", "idempotency_key", "scheduled", "published", "xid")}),
        )

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[str]]:
        """Name the event and count its tasks, all final, which go with it."""
        (event,) = objs
        count = _task_count_if_spent(event) or 0
        told = ngettext("%s final task", "%s final tasks", count) % number(count)
        counts = {str(self.opts.verbose_name_plural): 1, gettext("tasks"): count}
        return [str(event), [told]], counts, set(), []

    def delete_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        """Ask, or delete, where consumers that begin to read the event meanwhile are seen."""
        with together(router.db_for_write(Event), may_idle=True):
            return super().delete_view(request, *args, **kwargs)

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        """Delete the event with its tasks. Raises PermissionDenied if one was reset meanwhile."""
        using = obj._state.db
        check_read_committed(using, "deleted")
        sql.rows(using, "lock_stream", {"stream_id": obj.stream_id})
        if _task_count_if_spent(obj) is None or not _prune(obj):
            raise PermissionDenied
        order = order_of(request, event=obj.pk)
        order.record("events.delete", using=using, counts={"deleted": 1}, ids=[obj.pk])
        signals.tell(signals.pruned, Event, connections[using], count=1)

    @admin.display(description=_("event"))
    def name(self, event: Event) -> str:
        return format_html("{} <code>{}</code>", visible(event.subject), event.pk)

    @admin.display(description=_("stream"))
    def stream_link(self, event: Event) -> str:
        return links_of(event).to_row(Stream, event.stream_id, event.stream.name)

    @admin.display(description=_("resource key"))
    def resource_key_text(self, event: Event) -> str:
        return visible(event.resource_key) or NOTHING

    @admin.display(description=_("body"))
    def size(self, event: Any) -> str:
        return filesizeformat(event.body_size)

    # Ids are sorted by time, and have an index.
    @admin.display(description=_("published"), ordering="id")
    def created(self, event: Event) -> str:
        return moment(event.created_at)

    @admin.display(description=_("published"))
    def published(self, event: Event) -> str:
        return exact_moment(event.created_at)

    @admin.display(description=_("scheduled"))
    def scheduled(self, event: Event) -> str:
        return exact_moment(event.schedule_at)

    @admin.display(description=_("metadata"))
    def metadata_text(self, event: Event) -> str:
        if not event.metadata:
            return NOTHING
        return preformatted(content.pretty_value(event.metadata))

    @admin.display(description=_("content"))
    def body_text(self, event: Any) -> str:
        start = Func(
            F("body"),
            Value(1),
            Value(content.READ_MAX),
            function="substring",
            output_field=BinaryField(),
        )
        stored = Event.objects.using(event._state.db).filter(pk=event.pk)
        (read,) = stored.values_list(start, flat=True)
        if is_sealed(bytes(read)):
            return body_text(stored.only("body").get())
        return _rendered(bytes(read), event.body_size)

    @admin.display(description=_("content"))
    def body_withheld(self, event: Any) -> str:
        size = filesizeformat(event.body_size)
        return gettext("%(size)s; you may not see it.") % {"size": size}

    @admin.display(description=_("tasks"))
    def tasks(self, event: Event) -> str:
        owed = Task.objects.using(event._state.db).filter(event=event).select_related("consumer")
        narrow = with_is_due(owed.defer("attempted_errors", "result"))
        rows = [
            {
                "task": links_of(event).to_row(Task, task.pk, task.pk),
                "consumer": links_of(event).to_row(Consumer, task.consumer_id, task.consumer.name),
                "badge": task_badge(task),
                "attempts": f"{task.attempt_count} / {task.consumer.attempt_max}",
                "ended": moment(task.finalized_at),
            }
            for task in narrow.order_by("consumer__name")
        ]
        return render_to_string("admin/kanthorq_django/event/tasks.html", {"rows": rows})


def body_text(row: Event | Schedule) -> str:
    """Return the body of ``row`` for its page, or why it cannot be opened."""
    try:
        body = bytes(row.body)
    except UndecodableEvent as error:
        return format_html('<p class="kq-content-kind">{}</p>', error)
    return _rendered(body[: content.READ_MAX], len(body))


def _rendered(start: bytes, size: int) -> str:
    shown = content.describe(start, size)
    context = {"content": shown, "kind": KINDS[shown.kind], "size": size}
    return render_to_string("admin/kanthorq_django/event/body.html", context)


def _with_size(events: QuerySet[Any]) -> QuerySet[Any]:
    """Let each event tell ``body_size`` in bytes, known without reading the body."""
    size = Func(F("body"), function="octet_length", output_field=IntegerField())
    sized: QuerySet[Any] = events.annotate(body_size=size)
    return sized


def _found(events: QuerySet[Any], term: str) -> QuerySet[Any]:
    if not term:
        return events
    try:
        return events.filter(pk=UUID(term))
    except ValueError:
        is_possible = len(term) <= SUBJECT_SIZE_MAX
        return events.filter(subject__startswith=term) if is_possible else events.none()


def _task_count_if_spent(event: Event) -> int | None:
    """Return how many tasks ``event`` has, or None if one is open or some consumer has not read it.

    The page of the stream that begins, and ends, with this event.
    """
    params = {
        "stream_id": event.stream_id,
        "older_than": AT_ONCE,
        "after_xid": str(event.xid),
        "after_id": UUID(int=event.pk.int - 1),
        "batch": 1,
    }
    for row in sql.rows(event._state.db or DEFAULT_DB_ALIAS, "prunable", params):
        if row.id == event.pk and row.is_prunable:
            return int(row.task_count or 0)
    return None


def _prune(event: Event) -> bool:
    """Delete ``event`` and its tasks, and tell so; do nothing while one is open or locked."""
    params = {"ids": [event.pk], "older_than": AT_ONCE}
    (pruned,) = sql.rows(event._state.db or DEFAULT_DB_ALIAS, "prune", params)
    return bool(pruned.event_ids)
