"""What each database role needs of our tables, and no more.

The owner of the tables, who migrates, also rebases and reencrypts: both rewrite events.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from django.db import connections
from psycopg.sql import SQL, Composable, Identifier

PREFIX = "kanthorq_django_"
NAME_SIZE_MAX = 63  # bytes; PostgreSQL cuts longer names, and two may become one

# All but xid, which must be the transaction's own: a forged one is delivered never, or twice.
_PUBLISHED = (
    "id",
    "stream_id",
    "subject",
    "body",
    "metadata",
    "resource_key",
    "idempotency_key",
    "schedule_at",
    "created_at",
)
_EVENT_BUT_BODY = (*(column for column in _PUBLISHED if column != "body"), "xid")
_SCHEDULE_BUT_BODY = (
    "id",
    "name",
    "stream_id",
    "subject",
    "metadata",
    "resource_key",
    "rrule",
    "dtstart",
    "timezone",
    "exdates",
    "catchup",
    "next_at",
    "last_at",
    "cancelled_at",
    "created_at",
)


class Privilege(NamedTuple):
    """``verb`` on ``table``, or on some of its columns."""

    verb: str
    table: str
    columns: tuple[str, ...] = ()


_READ_STREAM = Privilege("SELECT", "stream")
_MAKE_STREAM = Privilege("INSERT", "stream", ("name", "created_at"))
# What locks a row has to be allowed to update some column of it.
_LOCK_STREAM = Privilege("UPDATE", "stream", ("created_at",))
_LOCK_CONSUMER = Privilege("UPDATE", "consumer", ("created_at",))
_LOCK_TASK = Privilege("UPDATE", "task", ("created_at",))
_PUBLISH = Privilege("INSERT", "event", _PUBLISHED)
_LOOK = (
    _READ_STREAM,
    Privilege("SELECT", "consumer"),
    Privilege("SELECT", "task"),
    Privilege("SELECT", "event", _EVENT_BUT_BODY),
)
_RECORD = (Privilege("SELECT", "operatoraction"), Privilege("INSERT", "operatoraction"))

ROLES: Mapping[str, tuple[Privilege, ...]] = {
    "publisher": (
        _READ_STREAM,
        _MAKE_STREAM,
        Privilege("SELECT", "event", _EVENT_BUT_BODY),
        _PUBLISH,
    ),
    "worker": (
        _READ_STREAM,
        _MAKE_STREAM,
        Privilege("SELECT", "event"),
        _PUBLISH,
        *(Privilege(verb, "consumer") for verb in ("SELECT", "INSERT", "UPDATE")),
        *(Privilege(verb, "task") for verb in ("SELECT", "INSERT", "UPDATE")),
        Privilege("SELECT", "schedule"),
        Privilege("UPDATE", "schedule", ("next_at", "last_at", "cancelled_at")),
        *(Privilege(verb, "worker") for verb in ("SELECT", "INSERT", "UPDATE", "DELETE")),
    ),
    "viewer": (
        *_LOOK,
        Privilege("SELECT", "schedule", _SCHEDULE_BUT_BODY),
        Privilege("SELECT", "worker"),
        Privilege("SELECT", "operatoraction"),
    ),
    "operator": (
        *_LOOK,
        Privilege("SELECT", "event"),
        Privilege("SELECT", "worker"),
        _LOCK_STREAM,
        _LOCK_CONSUMER,
        Privilege("UPDATE", "task"),
        *(Privilege("DELETE", table) for table in ("consumer", "event", "task")),
        *(Privilege(verb, "schedule") for verb in ("SELECT", "INSERT", "UPDATE", "DELETE")),
        *_RECORD,
    ),
    "pruner": (
        *_LOOK,
        _LOCK_STREAM,
        _LOCK_TASK,
        *(Privilege("DELETE", table) for table in ("event", "task", "operatoraction")),
        *_RECORD,
    ),
}
TABLES = ("stream", "event", "consumer", "task", "schedule", "worker", "operatoraction")
# ``kanthorq health`` tells whether migrations are missing.
LOOKS_AT_MIGRATIONS = frozenset({"viewer", "operator"})


def revocation(grantee: str, schema: str) -> str:
    """Return the SQL that takes from ``grantee`` what an earlier release may have given it."""
    tables = SQL(", ").join(_table(schema, PREFIX + name) for name in TABLES)
    return _text(SQL("REVOKE ALL ON {} FROM {};").format(tables, Identifier(grantee)))


def statements(role: str, grantee: str, schema: str) -> Iterator[str]:
    """Yield the SQL that gives ``grantee`` what ``role`` needs of ``schema``."""
    whom = Identifier(grantee)
    yield _text(SQL("GRANT USAGE ON SCHEMA {} TO {};").format(Identifier(schema), whom))
    for verb, name, columns in ROLES[role]:
        listed = SQL(", ").join(map(Identifier, columns))
        what = SQL(verb) + (SQL(" ({})").format(listed) if columns else SQL(""))
        on = _table(schema, PREFIX + name)
        yield _text(SQL("GRANT {} ON {} TO {};").format(what, on, whom))
    if role in LOOKS_AT_MIGRATIONS:
        on = _table(schema, "django_migrations")
        yield _text(SQL("GRANT SELECT ON {} TO {};").format(on, whom))


def may_read_bodies(using: str) -> bool:
    """Tell whether this connection's role may read the bodies of events; publishers need not."""
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT has_column_privilege(%s, 'body', 'SELECT')", [f"{PREFIX}event"])
        return bool(cursor.fetchone()[0])


def _table(schema: str, name: str) -> Composable:
    return Identifier(schema, name)


def _text(statement: Composable) -> str:
    return statement.as_string(None)
