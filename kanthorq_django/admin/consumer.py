"""Consumers: what they select, how far they are, and who works for them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.cancellations import cancellations_text
from kanthorq_django.admin.display import (
    NOTHING,
    Minimum,
    badge,
    exact_moment,
    moment,
    number,
    yes_or_no,
)
from kanthorq_django.admin.growth import growing
from kanthorq_django.admin.links import links_of
from kanthorq_django.admin.orders import order_of
from kanthorq_django.admin.paginator import COUNT_MAX
from kanthorq_django.admin.readonly import ReadOnlyAdmin, RelatedFilter
from kanthorq_django.admin.tally import Tally, tally
from kanthorq_django.domain.states import TaskState
from kanthorq_django.domain.subscriptions import registry
from kanthorq_django.models import Consumer, Stream, Task, Worker
from kanthorq_django.models.delivery.cursor import Lag
from kanthorq_django.models.task import STATE_LABELS

LAG_MAX = 1_000  # unread events that the list counts for each consumer
# What waits for a person first, what is done last.
SHOWN_STATES = (
    TaskState.DISCARDED,
    TaskState.RUNNING,
    TaskState.AVAILABLE,
    TaskState.RETRYABLE,
    TaskState.CANCELLING,
    TaskState.PENDING,
    TaskState.CANCELLED,
    TaskState.COMPLETED,
)
OPTIONS = (
    "attempt_max",
    "visibility_timeout",
    "timeout",
    "parked_text",
    "serialize",
    "deliver_from",
    "handles_cancellations",
)
OPTIONS_IN_CODE = ("retry", "atomic", "batch", "grouped")  # of a subscription, in no column
CURSOR = ("cursor", "window", "position_xid", "position_id", "cluster_id")


class ConsumerList(ChangeList):
    """A page of consumers, with an overview of each and of the workers."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        using = self.queryset.db
        tallies = tally([consumer.pk for consumer in self.result_list], using)
        self.alive = _alive_workers(using)
        self.capacity = sum(worker.concurrency for worker in self.alive)
        per_consumer = Counter(name for worker in self.alive for name in worker.consumers)
        for consumer in self.result_list:
            consumer.tally = tallies[consumer.pk]
            consumer.worker_count = per_consumer[consumer.name]
            # A statement each, over an index range of at most so many events.
            consumer.shown_lag = consumer.lag(LAG_MAX)
        ages = ((consumer.name, consumer.shown_lag.oldest) for consumer in self.result_list)
        self.growth = growing(using, ages)


@admin.register(Consumer)
class ConsumerAdmin(ReadOnlyAdmin):
    """Code declares consumers. One that no code declares any more can be deleted here."""

    # What changes from day to day first: a narrow window shows three or four columns.
    list_display = ("called", "lag_text", "tasks", "worker_count", "stream_link", "filters")
    list_filter = (("stream", RelatedFilter),)
    list_per_page = 25
    ordering = ("name",)
    sortable_by = ("called",)
    search_fields = ("name",)
    labels: ClassVar = {
        "position_xid": _("position, transaction ID"),
        "position_id": _("position, event ID"),
        "cluster_id": _("cluster ID"),
    }
    help_texts: ClassVar = {
        "cursor": _("A snapshot of PostgreSQL; all that is visible in it has been read."),
        "window": _("The snapshot that is being read, while a backlog is worked off."),
        "position_xid": _("Of the last event that was read of the window."),
        "cluster_id": _("Of the cluster of PostgreSQL whose transactions the cursor is about."),
    }

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).select_related("stream")

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        cancelling = ("cancel_attempt_max",) if obj and obj.has_cancel_handler else ()
        return (
            (None, {"fields": ("name", "life_exactly", "stream_link", "filters", "created")}),
            (_("Work"), {"fields": ("lag_text", "tasks", "workers", "cancellations")}),
            (_("Options"), {"fields": (*OPTIONS, *cancelling, "options_in_code")}),
            (_("Cursor"), {"classes": ("collapse",), "fields": CURSOR}),
        )

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Allow it only for a consumer that neither code declares nor a worker works for."""
        if not request.user.has_perm("kanthorq_django.delete_consumer"):
            return False
        # Without a row, Django asks whether to offer the deletion of all that are ticked.
        return obj is not None and _is_deletable(obj)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return ConsumerList

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[str]]:
        """Count the tasks that go with the consumer; Django would load and list each of them."""
        (consumer,) = objs
        tasks = Task.objects.filter(consumer=consumer).values("pk")[: COUNT_MAX + 1].count()
        count = Minimum(COUNT_MAX) if tasks > COUNT_MAX else tasks
        counts = {str(self.opts.verbose_name_plural): 1, gettext("tasks"): count}
        return [str(consumer), _told_of_deletion(consumer, count)], counts, set(), []

    def delete_model(self, request: HttpRequest, obj: Consumer) -> None:
        """Delete the consumer with its tasks, and record it, in the transaction of the view."""
        order = order_of(request, consumer=obj.name)
        order.record("consumers.delete", using=obj.using, counts={"deleted": 1}, ids=[obj.name])
        super().delete_model(request, obj)

    @admin.display(description=_("name"), ordering="name")
    def called(self, consumer: Consumer) -> str:
        """Tell at the name, which every window shows, of one that no code declares."""
        if registry.find(consumer.name):
            return consumer.name
        return format_html("{} {}", consumer.name, _orphaned())

    @admin.display(description=_("in code"))
    def life_exactly(self, consumer: Consumer) -> str:
        if subscription := registry.find(consumer.name):
            declared = badge(gettext("Declared"), "alive")
            return format_html("{} <code>{}</code>", declared, subscription.place)
        return format_html(
            "{} {}",
            _orphaned(),
            gettext(
                "No code in this process declares it; it keeps its tasks, and nobody runs them."
            ),
        )

    @admin.display(description=_("parked"))
    def parked_text(self, consumer: Consumer) -> str:
        return yes_or_no(consumer.parked)

    @admin.display(description=_("has a cancellation handler"))
    def handles_cancellations(self, consumer: Consumer) -> str:
        return yes_or_no(consumer.has_cancel_handler)

    @admin.display(description=_("options in code alone"))
    def options_in_code(self, consumer: Consumer) -> str:
        if (subscription := registry.find(consumer.name)) is None:
            return NOTHING
        options = ((name, repr(getattr(subscription, name))) for name in OPTIONS_IN_CODE)
        return format_html_join("", "<code>{}={}</code><br>", options)

    @admin.display(description=_("stream"))
    def stream_link(self, consumer: Consumer) -> str:
        return links_of(consumer).to_row(Stream, consumer.stream_id, consumer.stream.name)

    @admin.display(description=_("filters"))
    def filters(self, consumer: Consumer) -> str:
        includes = _codes(consumer.subject_includes)
        if not consumer.subject_excludes:
            return includes
        excludes = _codes(consumer.subject_excludes)
        return format_html(gettext("{} but not {}"), includes, excludes)

    @admin.display(description=_("lag"))
    def lag_text(self, consumer: Any) -> str:
        lag: Lag = getattr(consumer, "shown_lag", None) or consumer.lag()
        if lag.oldest is None:
            return gettext("caught up")
        count = Minimum(lag.count) if lag.is_bounded else lag.count
        oldest = moment(timezone.now() - lag.oldest)
        text = ngettext("{} event, {}", "{} events, the oldest {}", lag.count)
        return format_html(text, number(count), oldest)

    @admin.display(description=_("tasks"))
    def tasks(self, consumer: Any) -> str:
        counted: Tally = (
            getattr(consumer, "tally", None) or (tally([consumer.pk], consumer.using)[consumer.pk])
        )
        return format_html_join(" ", "{}", self._chips(consumer, counted)) or NOTHING

    @admin.display(description=_("workers"))
    def worker_count(self, consumer: Any) -> int:
        return consumer.worker_count  # type: ignore[no-any-return]  # set by the list

    @admin.display(description=_("workers"))
    def workers(self, consumer: Consumer) -> str:
        links = [
            (links_of(consumer).to_row(Worker, worker.pk, worker),)
            for worker in _alive_workers(consumer.using)
            if consumer.name in worker.consumers
        ]
        return format_html_join(", ", "{}", links) or gettext("none alive")

    @admin.display(description=_("cancellations"))
    def cancellations(self, consumer: Consumer) -> str:
        return cancellations_text(consumer)

    @admin.display(description=_("created"))
    def created(self, consumer: Consumer) -> str:
        return exact_moment(consumer.created_at)

    def _chips(self, consumer: Consumer, counted: Tally) -> Iterator[tuple[str]]:
        if counted.stuck:
            yield (self._chip(consumer, gettext("Stuck"), counted.stuck, "stuck", stuck="yes"),)
        for state in SHOWN_STATES:
            if count := counted.counts.get(state):
                label, kind = STATE_LABELS[state], state.name.lower()
                yield (self._chip(consumer, label, count, kind, state__exact=int(state)),)

    def _chip(
        self, consumer: Consumer, label: object, count: int, kind: str, **query: str | int
    ) -> str:
        query["consumer__id__exact"] = consumer.pk
        return links_of(consumer).to_list(Task, badge(f"{label} {number(count)}", kind), query)


def _orphaned() -> str:
    return badge(gettext("Orphaned"), "gone")


def _alive_workers(using: str) -> list[Worker]:
    return list(Worker.objects.using(using).alive().order_by("host", "pid"))


def _is_deletable(consumer: Consumer) -> bool:
    """Tell whether nobody is there for ``consumer``; a worker may run other code than we do."""
    return registry.find(consumer.name) is None and not any(
        consumer.name in worker.consumers for worker in _alive_workers(consumer.using)
    )


def _told_of_deletion(consumer: Consumer, count: int) -> list[str]:
    """Say what goes with the consumer and cannot be brought back, and what may come back."""
    counted = {"open": number(tally([consumer.pk], consumer.using)[consumer.pk].open)}
    told = ngettext(
        "%(open)s of its %(count)s task is open, and will never be run.",
        "%(open)s of its %(count)s tasks are open, and will never be run.",
        count,
    )
    return [
        told % (counted | {"count": number(count)}),
        gettext(
            "A process whose code still declares it makes it anew: as a new consumer it reads from "
            "the beginning of the stream, or from where its deliver= says, and handles that anew."
        ),
    ]


def _codes(patterns: Iterable[str]) -> str:
    return format_html_join(" ", "<code>{}</code>", ((pattern,) for pattern in patterns))
