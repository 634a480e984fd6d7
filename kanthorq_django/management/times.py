"""Times as operators write and read them: durations such as ``7d`` or ``1h30m``, and moments."""

import re
from datetime import datetime, timedelta

from django.utils import timezone

DURATION_MAX = timedelta(days=36_500)  # PostgreSQL can subtract it from any current time

_UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_DURATION = re.compile(r"(?:\d{1,9}[wdhms])+", re.ASCII)
_PART = re.compile(r"(\d+)([wdhms])", re.ASCII)
_STEPS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def parse_duration(text: str) -> timedelta:
    """Return the duration that ``text`` spells, such as ``7d`` or ``1h30m``.

    Raises ValueError, in one sentence, if it is none or longer than 36,500 days.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(
            f"{text[:40]!a} is not a duration; write whole numbers with a unit "
            "(w, d, h, m or s), such as 7d, 12h, 30m or 90s."
        )
    duration = sum(
        (timedelta(**{_UNITS[unit]: int(number)}) for number, unit in _PART.findall(text)),
        timedelta(0),
    )
    if duration > DURATION_MAX:
        raise ValueError(f"{text[:40]!a} is too long; the limit is {DURATION_MAX.days:,} days.")
    return duration


def format_duration(duration: timedelta) -> str:
    """Return ``duration`` in its two largest units, cut off: ``2d4h``, ``3m5s``, ``0s``."""
    seconds = max(int(duration.total_seconds()), 0)
    parts: list[tuple[int, str]] = []
    for unit, size in _STEPS:
        count, seconds = divmod(seconds, size)
        if count or parts:
            parts.append((count, unit))
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count) or "0s"


def format_moment(moment: datetime | None) -> str:
    """Return ``moment`` in the current time zone, to the second; ``-`` for none."""
    if moment is None:
        return "-"
    local = timezone.localtime(moment) if timezone.is_aware(moment) else moment
    return f"{local:%Y-%m-%d %H:%M:%S}"
