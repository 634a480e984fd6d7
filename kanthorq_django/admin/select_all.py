"""An operation on all tasks that match: asked first, then done in requests of bounded length."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from django import forms
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext

from kanthorq_django.admin.display import number, state_badge
from kanthorq_django.admin.operations import OPERATIONS, Operation, Report, carry_out
from kanthorq_django.admin.orders import REASON, order_on_list
from kanthorq_django.admin.paginator import COUNT_MAX
from kanthorq_django.models.audit import Order
from kanthorq_django.models.task import TaskQuerySet

if TYPE_CHECKING:
    from kanthorq_django.admin.task_actions import TaskActionsAdmin

SECONDS_MAX = 10.0  # that one request may work; proxies give up on longer ones

COUNTS = ("updated", "requested", "noop")

# Where a list says as what it took a search, so that the confirmation means the same.
MEANING = "meaning"


class _Kind(NamedTuple):
    """Tasks that a forecast counts together; sorted, those that are left alone come last."""

    is_spared: bool
    consumer: str
    state: int
    fate: str


class ProgressForm(forms.Form):
    """How far an operation has come; ``through`` is the newest task that was there when asked."""

    through = forms.IntegerField(min_value=0, widget=forms.HiddenInput)
    after = forms.IntegerField(min_value=0, initial=0, widget=forms.HiddenInput)
    updated = forms.IntegerField(min_value=0, initial=0, widget=forms.HiddenInput)
    requested = forms.IntegerField(min_value=0, initial=0, widget=forms.HiddenInput)
    noop = forms.IntegerField(min_value=0, initial=0, widget=forms.HiddenInput)
    meaning = forms.CharField(required=False, widget=forms.HiddenInput)


def operate(
    operation: Operation, model_admin: "TaskActionsAdmin", request: HttpRequest, tasks: TaskQuerySet
) -> HttpResponse | None:
    """Ask, or go on where the form says; return None once all tasks have been looked at.

    Raises BadRequest for a form that no page of ours sent.
    """
    if "confirmed" not in request.POST:
        newest = tasks.order_by("-pk").values_list("pk", flat=True).first()
        form = ProgressForm(initial={"through": newest or 0} | _meaning(request))
        return _page(operation, model_admin, request, form=form, **_forecast(operation, tasks))
    given = ProgressForm(request.POST)
    if not given.is_valid():
        raise BadRequest("The confirmation is not valid.")
    order = order_on_list(request)
    so_far, is_done = _go_on(operation, tasks, order, given.cleaned_data)
    if is_done:
        model_admin.tell(request, operation, so_far)
        return None
    initial = {name: getattr(so_far, name) for name in COUNTS}
    form = ProgressForm(
        initial=initial
        | {"after": so_far.last, "through": given.cleaned_data["through"]}
        | _meaning(request)
    )
    return _page(operation, model_admin, request, form=form, so_far=so_far)


def _meaning(request: HttpRequest) -> dict[str, str]:
    return {MEANING: request.META.get(MEANING, "")}


def _go_on(
    operation: Operation, tasks: TaskQuerySet, order: Order, given: dict[str, Any]
) -> tuple[Report, bool]:
    before = Report(**{name: given[name] for name in COUNTS})
    report, is_done = carry_out(
        operation,
        tasks.filter(pk__lte=given["through"]),
        order,
        after=given["after"],
        seconds_max=SECONDS_MAX,
    )
    return before + report, is_done


def _forecast(operation: Operation, tasks: TaskQuerySet) -> dict[str, Any]:
    """Say in which states the tasks, or so many of them, are, and what would become of them."""
    counts = Counter(_kinds(operation, tasks))
    rows = [
        {
            "consumer": kind.consumer,
            "badge": state_badge(kind.state),
            "count": number(counts[kind]),
            "fate": kind.fate,
        }
        for kind in sorted(counts)
    ]
    count = counts.total()
    return {"rows": rows, "count": count, "is_minimum": count == COUNT_MAX}


def _kinds(operation: Operation, tasks: TaskQuerySet) -> Iterator[_Kind]:
    columns = ("consumer__name", "state", "cancel_requested_at")
    for consumer, state, asked_at in tasks.order_by().values_list(*columns)[:COUNT_MAX]:
        if operation.can_move(state):
            yield _Kind(False, consumer, state, str(OPERATIONS[operation.verb].name))
        elif operation.can_stop(state, is_asked=asked_at is not None):
            yield _Kind(False, consumer, state, gettext("Asked to stop"))
        else:
            yield _Kind(True, consumer, state, gettext("Left alone"))


def _page(
    operation: Operation, model_admin: "TaskActionsAdmin", request: HttpRequest, **context: Any
) -> HttpResponse:
    request.current_app = model_admin.admin_site.name
    return TemplateResponse(
        request,
        "admin/kanthorq_django/task/select_all.html",
        {
            **model_admin.admin_site.each_context(request),
            "title": operation.name,
            "opts": model_admin.opts,
            "operation": operation,
            "reason": request.POST.get(REASON, ""),
            "selected_name": ACTION_CHECKBOX_NAME,
            "selected": request.POST.getlist(ACTION_CHECKBOX_NAME)[:1],
            **context,
        },
    )
