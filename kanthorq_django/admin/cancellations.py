"""How a consumer's cancellations went of late, as its page tells it."""

from datetime import timedelta

from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.formats import number_format
from django.utils.timesince import timeuntil
from django.utils.translation import gettext

from kanthorq_django.admin.content import redacted_error
from kanthorq_django.admin.display import NOTHING, Minimum, number
from kanthorq_django.models import Consumer
from kanthorq_django.models.maintenance.cancellations import cancellations

SOON = timedelta(minutes=1)


def cancellations_text(consumer: Consumer) -> str:
    """Return the numbers and the reasons of the last 24 hours, at a bounded cost."""
    told = cancellations([consumer.pk], consumer.using)[consumer.pk]
    if not told:
        return gettext("None in the last 24 hours.")
    rate = told.success_rate
    context = {
        "cancelled": number(Minimum(told.cancelled) if told.is_bounded else told.cancelled),
        "succeeded": number(told.succeeded),
        "failed": number(told.failed),
        "rate": NOTHING if rate is None else f"{rate:.0%}",
        "median": _span(told.median),
        "longest": _span(told.longest),
        "failures": [(redacted_error(error), number(count)) for error, count in told.failures],
    }
    return render_to_string("admin/kanthorq_django/consumer/cancellations.html", context)


def _span(span: timedelta | None) -> str:
    """Return ``span`` for people, with tenths while it is short."""
    if span is None:
        return NOTHING
    if span < SOON:
        return gettext("%s seconds") % number_format(span.total_seconds(), 1)
    now = timezone.now()
    return timeuntil(now + span, now)
