"""The ways to an operation: a ticked list, a button on a task's page, and all that match."""

from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.contrib.auth import get_permission_codename
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_POST

from kanthorq_django.admin import select_all
from kanthorq_django.admin.operations import OPERATIONS, Operation, Report, carry_out
from kanthorq_django.admin.orders import ReasonedActionForm, is_on_all, order_of, order_on_list
from kanthorq_django.admin.readonly import ReadOnlyAdmin
from kanthorq_django.models import Task
from kanthorq_django.models.task import TaskQuerySet


class OperatingAdmin(ReadOnlyAdmin):
    """Offers each operation to those who have the permission of that name, and to nobody else."""

    actions = tuple(OPERATIONS)
    action_form = ReasonedActionForm

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "cancel")

    def has_resume_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "resume")

    def has_release_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "release")

    def has_reset_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "reset")

    @admin.action(permissions=["cancel"], description=_("Cancel selected tasks"))
    def cancel(self, request: HttpRequest, tasks: TaskQuerySet) -> HttpResponse | None:
        return self._operate(OPERATIONS["cancel"], request, tasks)

    @admin.action(
        permissions=["cancel"], description=_("Cancel selected tasks, and stop those that run")
    )
    def cancel_running(self, request: HttpRequest, tasks: TaskQuerySet) -> HttpResponse | None:
        return self._operate(OPERATIONS["cancel_running"], request, tasks)

    @admin.action(permissions=["resume"], description=_("Resume selected tasks"))
    def resume(self, request: HttpRequest, tasks: TaskQuerySet) -> HttpResponse | None:
        return self._operate(OPERATIONS["resume"], request, tasks)

    @admin.action(permissions=["release"], description=_("Release selected tasks"))
    def release(self, request: HttpRequest, tasks: TaskQuerySet) -> HttpResponse | None:
        return self._operate(OPERATIONS["release"], request, tasks)

    @admin.action(permissions=["reset"], description=_("Reset selected tasks"))
    def reset(self, request: HttpRequest, tasks: TaskQuerySet) -> HttpResponse | None:
        return self._operate(OPERATIONS["reset"], request, tasks)

    def get_urls(self) -> list[URLPattern]:
        return [
            path(
                f"<path:object_id>/{operation.action}/",
                self.admin_site.admin_view(require_POST(self._view_of(operation))),
                name=f"{self.opts.app_label}_{self.opts.model_name}_{operation.action}",
            )
            for operation in OPERATIONS.values()
        ] + super().get_urls()

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        task = context["original"]
        context["operations"] = [
            (operation, self._url(operation.action, task.pk))
            for operation in OPERATIONS.values()
            if _is_offered(operation, task) and self._may(request, operation.verb)
        ]
        return super().render_change_form(request, context, *args, **kwargs)

    def tell(self, request: HttpRequest, operation: Operation, report: Report) -> None:
        """Show what happened, counted and id by id; as a warning if something was left alone."""
        is_changed = report.updated or report.requested
        level = messages.WARNING if report.noop or not is_changed else messages.SUCCESS
        told = format_html("{}: {} {}", operation.name, str(report), report.by_event)
        self.message_user(request, told, level)

    def _may(self, request: HttpRequest, verb: str) -> bool:
        codename = get_permission_codename(verb, self.opts)
        return self.has_view_permission(request) and request.user.has_perm(
            f"{self.opts.app_label}.{codename}"
        )

    def _operate(
        self, operation: Operation, request: HttpRequest, tasks: TaskQuerySet
    ) -> HttpResponse | None:
        """Operate on the ticked rows at once; ask first when all that match are meant."""
        if is_on_all(request):
            return select_all.operate(operation, self, request, tasks)
        report, _done = carry_out(operation, tasks, order_on_list(request))
        self.tell(request, operation, report)
        return None

    def _view_of(self, operation: Operation) -> Callable[..., HttpResponse]:
        def operate(request: HttpRequest, object_id: str) -> HttpResponse:
            if not self._may(request, operation.verb):
                raise PermissionDenied
            task = self.get_object(request, object_id)
            if task is None:
                raise Http404
            order = order_of(request, event=task.event_id, consumer=task.consumer.name)
            tasks = Task.objects.using(task._state.db).filter(pk=task.pk)
            report, _done = carry_out(operation, tasks, order)
            self.tell(request, operation, report)
            query = request.GET.urlencode()
            return HttpResponseRedirect(
                self._url("change", task.pk) + (f"?{query}" if query else "")
            )

        return operate

    def _url(self, page: str, task_id: int) -> str:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_{page}"
        return reverse(name, args=(task_id,), current_app=self.admin_site.name)


def _is_offered(operation: Operation, task: Task) -> bool:
    """Tell whether a button would change ``task``; what waits needs no second way to cancel it."""
    if operation.stops_running:
        return operation.can_stop(task.state, is_asked=task.cancel_requested_at is not None)
    return operation.can_move(task.state)
