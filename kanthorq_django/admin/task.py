"""Tasks: found, looked at, and moved by those who may."""

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models import Q, QuerySet
from django.db.models.fields.json import KT
from django.db.models.functions import Left
from django.http import HttpRequest
from django.template.loader import render_to_string
from django.utils.dateparse import parse_datetime
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.confirmation import MEANING
from kanthorq_django.admin.content import pretty_value, redacted_error
from kanthorq_django.admin.display import (
    NOTHING,
    exact_moment,
    moment,
    preformatted,
    visible,
)
from kanthorq_django.admin.due import due_text, task_badge, with_is_due
from kanthorq_django.admin.links import links_of
from kanthorq_django.admin.readonly import RelatedFilter
from kanthorq_django.admin.task_actions import TaskActionsAdmin
from kanthorq_django.domain.failures import LINE_SIZE_MAX, recorded
from kanthorq_django.domain.states import CLAIMABLE, TaskState
from kanthorq_django.domain.subjects import SUBJECT_SIZE_MAX
from kanthorq_django.models import Consumer, Event, Task

ERROR_SHOWN = 160  # characters of the newest error in the list; its tooltip has all of them

# What a search may mean that is no event id.
BY_KEY, BY_SUBJECT = MEANINGS = ("resource_key", "event__subject__startswith")

# True for every task, and yet it halves the question: PostgreSQL proves of each half that one of
# the indexes of unfinished tasks holds the answer, which it cannot prove of the whole.
WITH_OR_WITHOUT_TURN = Q(turn_key__isnull=True) | Q(turn_key__isnull=False)
CLAIMABLE_CHOICES = {str(int(state)) for state in CLAIMABLE}


class StateFilter(admin.ChoicesFieldListFilter):
    """Tasks in one state; the few unfinished ones are found without reading the completed ones."""

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        tasks: Any = super().queryset(request, queryset)
        if not CLAIMABLE_CHOICES.isdisjoint(self.lookup_val or ()):
            tasks = tasks.filter(WITH_OR_WITHOUT_TURN)
        return tasks  # type: ignore[no-any-return]  # a TaskQuerySet


class StuckFilter(admin.SimpleListFilter):
    """Running tasks whose lease ran out; the next claim of a worker takes them over."""

    title = _("lease")
    parameter_name = "stuck"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [("yes", _("Ran out (stuck)"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        if self.value() != "yes":
            return None
        tasks: Any = queryset
        return tasks.stuck().filter(WITH_OR_WITHOUT_TURN)  # type: ignore[no-any-return]  # a TaskQuerySet


class AskedFilter(admin.SimpleListFilter):
    """Running tasks that were asked to stop and have not stopped yet."""

    title = _("cancellation")
    parameter_name = "asked"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [("yes", _("Running, asked to stop"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        if self.value() != "yes":
            return None
        tasks: Any = queryset
        asked = tasks.running().filter(cancel_requested_at__isnull=False)
        return asked.filter(WITH_OR_WITHOUT_TURN)  # type: ignore[no-any-return]  # a TaskQuerySet


class TaskList(ChangeList):
    """A page of tasks without what makes them wide, and the newest error of those not completed."""

    def get_queryset(self, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        tasks = super().get_queryset(*args, **kwargs)
        return tasks.defer("attempted_errors", "result")

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        # For the page's rows alone: a planner may evaluate columns before it sorts and cuts.
        shown = (
            Task.objects.using(self.queryset.db)
            .exclude(state=TaskState.COMPLETED)
            .filter(pk__in=[task.pk for task in self.result_list])
        )
        newest = Left(KT("attempted_errors__-1__error"), LINE_SIZE_MAX)
        errors = dict(shown.values_list("pk", newest))
        for task in self.result_list:
            task.newest_error = errors.get(task.pk)


@admin.register(Task)
class TaskAdmin(TaskActionsAdmin):
    """A list that a million tasks do not slow down, and a page that tells a task's whole story."""

    list_display = ("id", "badge", "subject", "consumer_link", "attempts", "due")
    list_filter = (("state", StateFilter), AskedFilter, StuckFilter, ("consumer", RelatedFilter))
    linked_lookups = ("event__id__exact",)
    ordering = ("-id",)
    sortable_by = ("id",)
    search_fields = ("event__subject",)  # get_search_results() says what is searched
    search_help_text = _("An event id, else a resource key, else the beginning of a subject.")
    fieldsets = (
        (None, {"fields": ("badge", "event_link", "consumer_link", "resource_key")}),
        (
            _("Attempts"),
            {"fields": ("attempts", "due_exactly", "attempted", "cancel_requested")},
        ),
        (_("Outcome"), {"fields": ("result_text", "errors")}),
        (_("Record"), {"fields": ("id", "turn_key", "lease_epoch", "created")}),
    )
    help_texts: ClassVar = {
        "turn_key": _("Tasks of a consumer that have the same one run one at a time."),
        "lease_epoch": _("Counts the leases; a worker that holds an older one settles nothing."),
    }

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return TaskList

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        tasks: Any = super().get_queryset(request).select_related("consumer")
        return with_is_due(tasks.with_events(without=("body", "metadata")))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Take the first meaning that fits: an index, or statistics, lead to each of them.

        Nothing leads to their union: every task would be read, with its event. A confirmation
        keeps to the meaning that its page told of, whatever has become of the key meanwhile.
        """
        term = search_term.strip()
        if not term:
            return queryset, False
        if event_id := _uuid(term):
            return queryset.filter(event_id=event_id), False
        if len(term) > SUBJECT_SIZE_MAX:
            return queryset.none(), False
        if (meaning := request.POST.get(MEANING)) not in MEANINGS:
            keyed = Task.objects.using(queryset.db).filter(resource_key=term)
            meaning = BY_KEY if keyed.exists() else BY_SUBJECT
        request.META[MEANING] = meaning
        return queryset.filter((meaning, term)), False

    @admin.display(description=_("state"))
    def badge(self, task: Task) -> str:
        return task_badge(task)

    @admin.display(description=_("subject"))
    def subject(self, task: Any) -> str:
        parts = [self._subject_link(task)]
        if task.resource_key:
            parts.append(format_html("<code>{}</code>", visible(task.resource_key)))
        if task.newest_error:
            error = redacted_error(task.newest_error).replace("\n", " ")
            line = '<div class="kq-newest-error" title="{}">{}</div>'
            parts.append(format_html(line, error, error[:ERROR_SHOWN]))
        return format_html_join(" ", "{}", ((part,) for part in parts))

    @admin.display(description=_("event"))
    def event_link(self, task: Task) -> str:
        return format_html("{} <code>{}</code>", self._subject_link(task), task.event_id)

    @admin.display(description=_("consumer"))
    def consumer_link(self, task: Task) -> str:
        return links_of(task).to_row(Consumer, task.consumer_id, task.consumer.name)

    @admin.display(description=_("attempts"))
    def attempts(self, task: Task) -> str:
        told = f"{task.attempt_count} / {task.consumer.attempt_max}"
        if not task.cancel_attempt_count:
            return told
        counts = {"count": task.cancel_attempt_count, "max": task.consumer.cancel_attempt_max}
        cancelling = gettext("cancellation %(count)d / %(max)d") % counts
        return f"{told}, {cancelling}"

    @admin.display(description=_("when"))
    def due(self, task: Task) -> str:
        return due_text(task, moment)

    @admin.display(description=_("due or ended"))
    def due_exactly(self, task: Task) -> str:
        return due_text(task, exact_moment)

    @admin.display(description=_("last attempt"))
    def attempted(self, task: Task) -> str:
        return exact_moment(task.attempted_at)

    @admin.display(description=_("cancellation requested"))
    def cancel_requested(self, task: Task) -> str:
        return exact_moment(task.cancel_requested_at)

    @admin.display(description=_("created"))
    def created(self, task: Task) -> str:
        return exact_moment(task.created_at)

    @admin.display(description=_("result"))
    def result_text(self, task: Task) -> str:
        return NOTHING if task.result is None else preformatted(pretty_value(task.result))

    @admin.display(description=_("errors"))
    def errors(self, task: Task) -> str:
        """Newest first: what is read when something has just gone wrong."""
        failures = [_failure(entry) for entry in reversed(recorded(task.attempted_errors))]
        if not failures:
            return NOTHING
        return render_to_string("admin/kanthorq_django/task/errors.html", {"failures": failures})

    def _subject_link(self, task: Task) -> str:
        event = task.known_event
        if event is None:
            return gettext("the event was deleted")
        return links_of(task).to_row(Event, event.pk, visible(event.subject))


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _failure(entry: dict[str, Any]) -> dict[str, Any]:
    """Return one of the recorded failures for the template."""
    return {
        "attempt": entry.get("attempt", "?"),
        "is_cancellation": entry.get("verb") == "cancel",
        "at": exact_moment(_parsed(entry.get("at"))),
        "error": redacted_error(entry["error"]),
        "stack": redacted_error(entry["stack"]),
    }


def _parsed(text: object) -> datetime | None:
    try:
        return parse_datetime(str(text))
    except ValueError:
        return None
