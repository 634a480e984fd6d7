"""An operation that is asked about first, then done in requests of bounded length."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from django import forms
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.safestring import SafeString
from django.utils.translation import gettext

from kanthorq_django.admin.display import disclosed, number, state_badge
from kanthorq_django.admin.operations import OPERATIONS, Operation, Report, carry_out
from kanthorq_django.admin.orders import REASON
from kanthorq_django.admin.paginator import COUNT_MAX
from kanthorq_django.models.audit import SAMPLE_SIZE, Order
from kanthorq_django.models.task import TaskQuerySet

if TYPE_CHECKING:
    from kanthorq_django.admin.task_actions import TaskActionsAdmin

SECONDS_MAX = 10.0  # that one request may work; proxies give up on longer ones

COUNTS = ("updated", "requested", "noop")

# Where a list says as what it took a search, so that the confirmation means the same.
MEANING = "meaning"


@dataclass(frozen=True, slots=True)
class Choice:
    """The tasks that a request is about: those of ``ticked``, one page's, or all that match.

    ``back`` leads to where nothing is done.
    """

    tasks: TaskQuerySet
    order: Order
    back: str
    ticked: tuple[str, ...] = ()
    is_all: bool = False


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
    operation: Operation, model_admin: "TaskActionsAdmin", request: HttpRequest, choice: Choice
) -> HttpResponse | None:
    """Ask, or go on where the form says; return None once all tasks have been looked at.

    Raises BadRequest for a form that no page of ours sent.
    """
    if "confirmed" not in request.POST:
        newest = choice.tasks.order_by("-pk").values_list("pk", flat=True).first()
        form = ProgressForm(initial={"through": newest or 0} | _meaning(request))
        told = _forecast(operation, choice)
        return _page(operation, model_admin, request, choice, form=form, **told)
    given = ProgressForm(request.POST)
    if not given.is_valid():
        raise BadRequest("The confirmation is not valid.")
    so_far, is_done = _go_on(operation, choice, given.cleaned_data)
    if is_done:
        model_admin.tell(request, operation, so_far)
        return None
    initial = {name: getattr(so_far, name) for name in COUNTS}
    form = ProgressForm(
        initial=initial
        | {"after": so_far.last, "through": given.cleaned_data["through"]}
        | _meaning(request)
    )
    return _page(operation, model_admin, request, choice, form=form, so_far=so_far)


def _meaning(request: HttpRequest) -> dict[str, str]:
    return {MEANING: request.META.get(MEANING, "")}


def _go_on(operation: Operation, choice: Choice, given: dict[str, Any]) -> tuple[Report, bool]:
    before = Report(**{name: given[name] for name in COUNTS})
    report, is_done = carry_out(
        operation,
        choice.tasks.filter(pk__lte=given["through"]),
        choice.order,
        after=given["after"],
        seconds_max=SECONDS_MAX,
    )
    return before + report, is_done


def _forecast(operation: Operation, choice: Choice) -> dict[str, Any]:
    """Say in which states the tasks, or so many of them, are, and what would become of them."""
    counts = Counter(_kinds(operation, choice.tasks))
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
    named = SafeString("") if choice.is_all else _by_event(choice.tasks, count)
    return {
        "rows": rows,
        "count": count,
        "counted": number(count),
        "is_minimum": count == COUNT_MAX,
        "named": named,
    }


def _by_event(tasks: TaskQuerySet, count: int) -> SafeString:
    events = tasks.order_by("pk").values_list("event_id", flat=True)[:SAMPLE_SIZE]
    return disclosed(gettext("By event:"), [str(pk) for pk in events], count)


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
    operation: Operation,
    model_admin: "TaskActionsAdmin",
    request: HttpRequest,
    choice: Choice,
    **context: Any,
) -> HttpResponse:
    request.current_app = model_admin.admin_site.name
    # Of all that match, Django wants one to be ticked.
    kept = choice.ticked[:1] if choice.is_all else choice.ticked
    return TemplateResponse(
        request,
        "admin/kanthorq_django/task/confirmation.html",
        {
            **model_admin.admin_site.each_context(request),
            "title": operation.name,
            "opts": model_admin.opts,
            "operation": operation,
            "reason": request.POST.get(REASON, ""),
            "selected_name": ACTION_CHECKBOX_NAME,
            "selected": kept,
            "is_all": choice.is_all,
            "back": choice.back,
            **context,
        },
    )
