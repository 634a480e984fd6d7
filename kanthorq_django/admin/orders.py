"""Whose order a request is, and what it selects: told to the audit with what comes of it."""

from typing import Any

from django import forms
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME, ActionForm
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from kanthorq_django.models.audit import REASON_SIZE_MAX, OperatorAction, Order

REASON = "reason"


class ReasonedActionForm(ActionForm):
    """Asks beside the action why; it need not be said."""

    reason = forms.CharField(
        label=_("Reason:"),
        required=False,
        widget=forms.TextInput(attrs={"maxlength": str(REASON_SIZE_MAX)}),
    )


def order_of(request: HttpRequest, **selection: Any) -> Order:
    """Return the order that ``request`` is, on ``selection``."""
    return Order(
        operator=request.user.get_username(),
        user_id=str(request.user.pk),
        origin=OperatorAction.Origin.ADMIN,
        selection=selection,
        reason=request.POST.get(REASON, ""),
    )


def order_on_list(request: HttpRequest) -> Order:
    """Return an order on the ticked rows of a list, or on all that its filters let through."""
    if is_on_all(request):
        filters = {name: request.GET.getlist(name) for name in request.GET}
        return order_of(request, all_matching=filters)
    return order_of(request, ticked=request.POST.getlist(ACTION_CHECKBOX_NAME))


def is_on_all(request: HttpRequest) -> bool:
    """Tell whether Django takes all rows that match, and not the ticked ones.

    Its form says so, by more words than the "1" of its own pages: "true" is one.
    """
    field = ReasonedActionForm.base_fields["select_across"]
    return bool(field.to_python(request.POST.get("select_across")))
