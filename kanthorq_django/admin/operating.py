"""The ways to an operation: a ticked list, a button on a task's page, and all that match."""

import functools
from collections.abc import Callable
from typing import Any

from django.contrib import messages
from django.contrib.auth import get_permission_codename
from django.core.exceptions import PermissionDenied
from django.forms import BooleanField
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.views.decorators.http import require_POST

from kanthorq_django.admin import select_all
from kanthorq_django.admin.operations import OPERATIONS, Operation, Report, carry_out
from kanthorq_django.admin.readonly import ReadOnlyAdmin
from kanthorq_django.models import Task
from kanthorq_django.models.task import TaskQuerySet

Action = Callable[[Any, HttpRequest, TaskQuerySet], HttpResponse | None]


class OperatingAdmin(ReadOnlyAdmin):
    """Offers each operation to those who have the permission of that name, and to nobody else."""

    def has_operation_permission(self, request: HttpRequest, operation: Operation) -> bool:
        """Tell whether the user may see tasks and do this to them."""
        codename = get_permission_codename(operation.verb, self.opts)
        return self.has_view_permission(request) and request.user.has_perm(
            f"{self.opts.app_label}.{codename}"
        )

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        actions: dict[str, Any] = super().get_actions(request)
        for operation in OPERATIONS.values():
            if self.has_operation_permission(request, operation):
                action = functools.partial(_operate_on_list, operation)
                actions[operation.verb] = (action, operation.verb, str(operation.description))
        return actions

    def get_urls(self) -> list[URLPattern]:
        return [
            path(
                f"<path:object_id>/{operation.verb}/",
                self.admin_site.admin_view(require_POST(self._view_of(operation))),
                name=f"{self.opts.app_label}_{self.opts.model_name}_{operation.verb}",
            )
            for operation in OPERATIONS.values()
        ] + super().get_urls()

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        task = context["original"]
        context["operations"] = [
            (operation, self._url(operation.verb, task.pk))
            for operation in OPERATIONS.values()
            if operation.can_move(task.state) and self.has_operation_permission(request, operation)
        ]
        return super().render_change_form(request, context, *args, **kwargs)

    def tell(self, request: HttpRequest, operation: Operation, report: Report) -> None:
        """Show what happened, as a warning when something was left alone."""
        level = messages.WARNING if report.noop or not report.updated else messages.SUCCESS
        self.message_user(request, f"{operation.name}: {report}", level)

    def _view_of(self, operation: Operation) -> Callable[..., HttpResponse]:
        def operate(request: HttpRequest, object_id: str) -> HttpResponse:
            if not self.has_operation_permission(request, operation):
                raise PermissionDenied
            task = self.get_object(request, object_id)
            if task is None:
                raise Http404
            report, _is_done = carry_out(
                operation, Task.objects.filter(pk=task.pk), request.user.pk
            )
            self.tell(request, operation, report)
            query = request.GET.urlencode()
            return HttpResponseRedirect(
                self._url("change", task.pk) + (f"?{query}" if query else "")
            )

        return operate

    def _url(self, page: str, task_id: int) -> str:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_{page}"
        return reverse(name, args=(task_id,), current_app=self.admin_site.name)


def _operate_on_list(
    operation: Operation, model_admin: OperatingAdmin, request: HttpRequest, tasks: TaskQuerySet
) -> HttpResponse | None:
    """Operate on the ticked rows at once; ask first when all that match are meant."""
    if BooleanField(required=False).to_python(request.POST.get("select_across")):
        return select_all.operate(operation, model_admin, request, tasks)
    report, _is_done = carry_out(operation, tasks, request.user.pk)
    model_admin.tell(request, operation, report)
    return None
