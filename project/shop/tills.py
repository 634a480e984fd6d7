"""The till reports what has come in: a schedule says when, any worker publishes it, one writes it.

There is one till, and so one schedule: a new sale takes it over.
"""

from datetime import datetime

from kanthorq_django import schedule
from kanthorq_django.models import Schedule
from project.shop.models import Sale
from project.shop.orders import STREAM

SCHEDULE = "till-report"
DAILY, EACH_MINUTE = "FREQ=DAILY", "FREQ=MINUTELY"


def schedule_reports(sale: Sale, rrule: str, first_at: datetime) -> Schedule:
    """Let the till of ``sale`` report at ``first_at``, a whole second, and as ``rrule`` goes on."""
    return schedule(
        SCHEDULE,
        rrule=rrule,
        dtstart=first_at,
        timezone="UTC",
        subject="till.due",
        body={"sale": sale.pk},
        metadata={"sale": sale.pk},
        stream=STREAM,
    )
