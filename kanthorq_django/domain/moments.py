"""Moments that PostgreSQL stores, Python reads back and every time zone can tell."""

from datetime import UTC, datetime, timedelta, tzinfo

from kanthorq_django.domain.quoting import quoted

# PostgreSQL stores moments that Python, whose years are 1 to 9999, cannot read back. One year less
# at either end: a time zone may shift a moment into the next.
YEAR_MIN, YEAR_MAX = 2, 9998

# PostgreSQL reads no offset beyond it, nor one with a fraction of a second.
OFFSET_MAX = timedelta(hours=15, minutes=59, seconds=59)


def moment_problem(moment: datetime) -> str | None:
    """Return what is wrong with ``moment``, as the end of a sentence, or None if it can be stored.

    It is in UTC unless it is naive.
    """
    try:
        year = moment.year if moment.utcoffset() is None else moment.astimezone(UTC).year
    except OverflowError:
        year = 0
    except Exception as error:  # noqa: BLE001  # a time zone may be foreign code
        return f"has a time zone that cannot tell its offset: {quoted(error)}"
    if YEAR_MIN <= year <= YEAR_MAX:
        return None
    return f"{moment} must be in the years {YEAR_MIN} to {YEAR_MAX}"


def told_in(zone: tzinfo, moment: datetime) -> datetime:
    """Return ``moment`` in ``zone``; unchanged if it is naive, or beyond Python's years there."""
    if moment.tzinfo is None:
        return moment
    try:
        return moment.astimezone(zone)
    except OverflowError:
        return moment


def with_offset(naive: datetime) -> str:
    """Return ``naive`` as it may be written instead, with an offset for example.

    Not its own text and an offset: behind a mere date, Python reads that as the time of day.
    """
    return f"{naive.isoformat(timespec='seconds' if naive.second else 'minutes')}+01:00"


def readable(moment: datetime) -> datetime:
    """Return a moment that can be stored, in UTC if PostgreSQL could not read its offset.

    Else it is unchanged: in the hour that comes twice when clocks are set back, Python takes no
    moment for equal to the same one in another zone.
    """
    offset = moment.utcoffset()
    if offset is None or (abs(offset) <= OFFSET_MAX and not offset.microseconds):
        return moment
    return moment.astimezone(UTC)
