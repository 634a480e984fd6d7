"""The database's clock, the only one that decides, and a time zone that is broken."""

from datetime import datetime, timedelta, tzinfo

from django.db import connection


def now() -> datetime:
    """Return the moment of the call, which moves on inside a transaction too."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        moment: datetime = cursor.fetchone()[0]
    return moment


class BrokenZone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        raise RuntimeError("no offset\nfor this")

    dst = utcoffset

    def tzname(self, _: datetime | None) -> str:
        return "broken"
