"""The ways to an operation on tasks: a ticked list, a button on a task's page, all that match."""

from collections.abc import Iterable

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.buttons import ButtonsAdmin
from kanthorq_django.admin.confirmation import Choice, operate
from kanthorq_django.admin.operations import OPERATIONS, Operation, Report, carry_out
from kanthorq_django.admin.orders import ReasonedActionForm, is_on_all, order_of, order_on_list
from kanthorq_django.admin.readonly import ReadOnlyAdmin
from kanthorq_django.models import Task
from kanthorq_django.models.task import TaskQuerySet


class TaskActionsAdmin(ButtonsAdmin, ReadOnlyAdmin):
    """Offers each operation to those who have the permission of that name, and to nobody else."""

    operations = tuple(OPERATIONS.values())
    actions = tuple(OPERATIONS)
    action_form = ReasonedActionForm

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "cancel")

    def has_resume_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "resume")

    def has_release_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "release")

    def has_reset_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "reset")

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

    def offered(self, row: Task) -> Iterable[Operation]:
        return (operation for operation in OPERATIONS.values() if _is_offered(operation, row))

    def operate_on(
        self, row: Task, operation: Operation, request: HttpRequest
    ) -> HttpResponse | None:
        order = order_of(request, event=row.event_id, consumer=row.consumer.name)
        tasks = Task.objects.using(row._state.db).filter(pk=row.pk)
        if operation.loss:
            return operate(
                operation, self, request, Choice(tasks, order, self.back_to(row, request))
            )
        report, _done = carry_out(operation, tasks, order)
        self.tell(request, operation, report)
        return None

    def tell(self, request: HttpRequest, operation: Operation, report: Report) -> None:
        """Show what happened, counted and id by id; as a warning if something was left alone."""
        is_changed = report.updated or report.requested
        level = messages.WARNING if report.noop or not is_changed else messages.SUCCESS
        told = format_html("{}: {} {}", operation.name, str(report), report.by_event)
        self.message_user(request, told, level)

    def _operate(
        self, operation: Operation, request: HttpRequest, tasks: TaskQuerySet
    ) -> HttpResponse | None:
        """Ask first where all that match are meant, or what cannot be taken back; else do it."""
        order = order_on_list(request)
        if (is_all := is_on_all(request)) or operation.is_asked_first:
            ticked = tuple(request.POST.getlist(ACTION_CHECKBOX_NAME))
            choice = Choice(tasks, order, request.get_full_path(), ticked, is_all)
            return operate(operation, self, request, choice)
        report, _done = carry_out(operation, tasks, order)
        self.tell(request, operation, report)
        return None


def _is_offered(operation: Operation, task: Task) -> bool:
    """Tell whether a button would change ``task``; what waits needs no second way to cancel it."""
    if operation.stops_running:
        return operation.can_stop(task.state, is_asked=task.cancel_requested_at is not None)
    return operation.can_move(task.state)
