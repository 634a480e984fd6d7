"""Moments that PostgreSQL stores, Python reads back and every time zone can tell."""

from datetime import UTC, datetime

# PostgreSQL stores moments that Python cannot read back; a day of room for time zones.
YEAR_MIN, YEAR_MAX = 2, 9998


def is_storable(moment: datetime) -> bool:
    """Tell whether ``moment``, in UTC unless it is naive, is in the years 2 to 9998."""
    try:
        year = moment.year if moment.utcoffset() is None else moment.astimezone(UTC).year
    except OverflowError:
        return False
    return YEAR_MIN <= year <= YEAR_MAX
