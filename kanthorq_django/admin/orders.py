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


def order_on_list(request: HttpRequest, *, is_all: bool) -> Order:
    """Return an order on the ticked rows of a list, or on all that its filters let through."""
    filters = {name: request.GET.getlist(name) for name in request.GET}
    if is_all:
        return order_of(request, all_matching=filters)
    return order_of(request, ticked=request.POST.getlist(ACTION_CHECKBOX_NAME))
