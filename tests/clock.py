"""The database's clock, the only one that decides."""

from datetime import datetime

from django.db import connection


def now() -> datetime:
    """Return the moment of the call, which moves on inside a transaction too."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        moment: datetime = cursor.fetchone()[0]
    return moment
