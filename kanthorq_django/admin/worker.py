"""Workers: who is alive, and what they work for."""

from typing import Any, ClassVar

from django.contrib import admin
from django.db.models import BooleanField, ExpressionWrapper, Q, QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.display import badge, exact_moment, moment
from kanthorq_django.admin.readonly import ReadOnlyAdmin
from kanthorq_django.models import Worker
from kanthorq_django.models.worker import DEAD_AFTER

NAMED_MAX = 5  # consumers that the list names


class LifeFilter(admin.SimpleListFilter):
    """Alive is who was seen lately, by the database's clock."""

    title = _("life")
    parameter_name = "life"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [("alive", _("Alive")), ("dead", _("Gone"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        found: Any = queryset
        if self.value() == "alive":
            return found.alive()  # type: ignore[no-any-return]  # a WorkerQuerySet
        return found.dead() if self.value() == "dead" else None


@admin.register(Worker)
class WorkerAdmin(ReadOnlyAdmin):
    """A worker process; one that stopped seeing to its row died or was frozen."""

    list_display = ("process", "life", "concurrency_text", "consumer_names", "started", "seen")
    list_filter = (LifeFilter,)
    ordering = ("-seen_at",)
    sortable_by = ()
    search_fields = ("host",)
    fields = (
        "life",
        "host",
        "pid",
        "concurrency",
        "all_consumers",
        "started_exactly",
        "seen_exactly",
    )
    labels: ClassVar = {"pid": _("process ID")}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        is_alive = ExpressionWrapper(Q(seen_at__gt=Now() - DEAD_AFTER), BooleanField())
        workers: QuerySet[Any] = super().get_queryset(request).annotate(is_alive=is_alive)
        return workers

    @admin.display(description=_("process"))
    def process(self, worker: Worker) -> str:
        return str(worker)

    @admin.display(description=_("life"))
    def life(self, worker: Any) -> str:
        return (
            badge(gettext("Alive"), "alive") if worker.is_alive else badge(gettext("Gone"), "gone")
        )

    @admin.display(description=_("concurrency"))
    def concurrency_text(self, worker: Worker) -> int:
        return worker.concurrency

    @admin.display(description=_("consumers"))
    def consumer_names(self, worker: Worker) -> str:
        named = ", ".join(map(str, worker.consumers[:NAMED_MAX]))
        others = len(worker.consumers) - NAMED_MAX
        if others <= 0:
            return named
        return named + ngettext(" and %d other", " and %d others", others) % others

    @admin.display(description=_("consumers"))
    def all_consumers(self, worker: Worker) -> str:
        return ", ".join(map(str, worker.consumers))

    @admin.display(description=_("started"))
    def started(self, worker: Worker) -> str:
        return moment(worker.started_at)

    @admin.display(description=_("started"))
    def started_exactly(self, worker: Worker) -> str:
        return exact_moment(worker.started_at)

    @admin.display(description=_("last seen"))
    def seen(self, worker: Worker) -> str:
        return moment(worker.seen_at)

    @admin.display(description=_("last seen"))
    def seen_exactly(self, worker: Worker) -> str:
        return exact_moment(worker.seen_at)
