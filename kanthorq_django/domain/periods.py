"""The periods that a recurrence rule goes by: INTERVAL counts them, BYSETPOS chooses in them."""

from collections.abc import Mapping
from datetime import datetime, timedelta

WEEKDAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")


def period_of(moment: datetime, parts: Mapping[str, str]) -> datetime:
    """Return the first day of the period of a rule that ``moment`` is in, at the same time."""
    match parts["FREQ"]:
        case "YEARLY":
            return moment.replace(month=1, day=1)
        case "MONTHLY":
            return moment.replace(day=1)
        case "WEEKLY":
            return week_of(moment, parts)
    return moment


def week_of(moment: datetime, parts: Mapping[str, str]) -> datetime:
    """Return the first day of the week of ``moment``, which begins as WKST says."""
    return moment - timedelta((moment.weekday() - WEEKDAYS.index(parts.get("WKST", "MO"))) % 7)
