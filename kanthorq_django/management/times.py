"""Times as operators write and read them: durations such as ``7d`` or ``1h30m``, and moments."""

import re
from datetime import datetime, timedelta

from django.utils import timezone

from kanthorq_django.domain.moments import told_in
from kanthorq_django.domain.quoting import quoted

DURATION_MAX = timedelta(days=36_500)  # PostgreSQL can subtract it from any current time

_SECONDS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:\d{1,9}[wdhms])+", re.ASCII)
_PART = re.compile(r"(\d+)([wdhms])", re.ASCII)


def parse_duration(text: str) -> timedelta:
    """Return the duration that ``text`` spells, such as ``7d`` or ``1h30m``.

    Raises ValueError, in one sentence, if it is none or longer than 36,500 days.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(
            f"{quoted(text)} is not a duration; write whole numbers with a unit "
            "(w, d, h, m or s), such as 7d, 12h, 30m or 90s."
        )
    seconds = sum(int(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
    if seconds > DURATION_MAX.total_seconds():
        raise ValueError(f"{quoted(text)} is too long; the limit is {DURATION_MAX.days:,} days.")
    return timedelta(seconds=seconds)


def format_duration(duration: timedelta) -> str:
    """Return ``duration`` in its two largest units, cut off: ``2d4h``, ``3m5s``, ``0s``."""
    seconds = max(int(duration.total_seconds()), 0)
    parts: list[tuple[int, str]] = []
    for unit in "dhms":
        count, seconds = divmod(seconds, _SECONDS[unit])
        if count or parts:
            parts.append((count, unit))
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count) or "0s"


def format_moment(moment: datetime | None) -> str:
    """Return ``moment`` in the current time zone and with its offset; ``-`` for none."""
    if moment is None:
        return "-"
    return format_local(told_in(timezone.get_current_timezone(), moment))


def format_local(moment: datetime) -> str:
    """Return ``moment`` in its own time zone, to the second, and with its offset unless naive."""
    return moment.isoformat(sep=" ", timespec="seconds")


def format_recorded(stored: object) -> str:
    """Return what JSON holds as a moment as ``format_moment()`` does; anything else as it is."""
    if stored is None:
        return "-"
    try:
        moment = datetime.fromisoformat(str(stored))
        return format_moment(moment) if timezone.is_aware(moment) else str(stored)
    except ValueError:
        return str(stored)
