"""Column types that Django lacks, and those that carry a rule of ours."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from zoneinfo import ZoneInfo

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import DEFAULT_DB_ALIAS, connections, models
from django.db.models.functions import Now
from django.utils import timezone

from kanthorq_django.domain import subjects
from kanthorq_django.domain.moments import YEAR_MAX, YEAR_MIN
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import InvalidFilter

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    _IntegerField = models.Field[int | None, int | None]
    _TextField = models.Field[str | None, str | None]
    _CharField = models.CharField[str, str]
    _JSONField = models.JSONField[list[str], list[str]]
    _DateTimeField = models.DateTimeField[datetime, datetime]
else:
    _IntegerField = _TextField = models.Field
    _CharField = models.CharField
    _JSONField = models.JSONField
    _DateTimeField = models.DateTimeField


_F = TypeVar("_F", bound="models.Field[Any, Any]")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class XidField(_IntegerField):
    """A full transaction id, ``xid8``: 64 bits that never wrap around. An int in Python."""

    description = "PostgreSQL transaction id"

    def db_type(self, connection: "BaseDatabaseWrapper") -> str:
        return "xid8"

    def get_internal_type(self) -> str:
        return "XidField"

    def from_db_value(self, value: str | int | None, *_: object) -> int | None:
        # psycopg has no loader for xid8 and hands over its text.
        return None if value is None else int(value)

    def to_python(self, value: Any) -> int | None:
        return None if value is None else int(value)

    def get_prep_value(self, value: Any) -> Any:
        prepared = super().get_prep_value(value)
        # There is no cast from bigint to xid8; text of unknown type becomes one by itself.
        return str(prepared) if isinstance(prepared, int) else prepared


class SnapshotField(_TextField):
    """A ``pg_snapshot``: which transactions had committed at a moment, as ``xmin:xmax:xip``."""

    description = "PostgreSQL snapshot"

    def db_type(self, connection: "BaseDatabaseWrapper") -> str:
        return "pg_snapshot"

    def get_internal_type(self) -> str:
        return "SnapshotField"

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        """Read it as text: PostgreSQL cannot compare snapshots, as DISTINCT and UNION have to.

        In a subquery as well, where a snapshot has to be cast back.
        """
        return f"{sql}::text", params


class SubjectField(_CharField):
    """A concrete subject, such as ``order.created``; wildcards are refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("max_length", subjects.SUBJECT_SIZE_MAX)
        super().__init__(*args, **kwargs)

    def validate(self, value: Any, model_instance: models.Model | None) -> None:
        super().validate(value, model_instance)
        if problem := subjects.subject_problem(value):
            raise ValidationError(f"{quoted(value)} is not a subject: {problem}.", code="subject")


class SubjectFiltersField(_JSONField):
    """A list of subject filters.

    A jsonb array rather than ``ArrayField``, which would make every project that installs
    this app install ``django.contrib.postgres`` as well.
    """

    def validate(self, value: Any, model_instance: models.Model | None) -> None:
        super().validate(value, model_instance)
        if problem := _filters_problem(value):
            raise ValidationError(problem, code="filters")

    def get_db_prep_save(self, value: Any, connection: "BaseDatabaseWrapper") -> Any:
        """Raise InvalidFilter for what a pull could not read, whichever way it is written."""
        check_filters(value)
        return super().get_db_prep_save(value, connection)


def check_filters(value: object) -> None:
    """Raise InvalidFilter unless ``value`` is a list of subject filters, or SQL that makes one."""
    if not hasattr(value, "resolve_expression") and (problem := _filters_problem(value)):
        raise InvalidFilter(problem)


def _filters_problem(value: object) -> str | None:
    if not isinstance(value, list | tuple):
        return f"Subject filters are a list, not {quoted(value)}."
    for pattern in value:
        if problem := subjects.filter_problem(pattern):
            return f"{quoted(pattern)} is not a filter: {problem}."
    if problem := subjects.filters_problem(value):
        return f"The subject filters are too much for PostgreSQL: {problem}."
    return None


_FIRST = f"'{YEAR_MIN:04}-01-01 00:00Z'::timestamptz"
_LAST = f"'{YEAR_MAX:04}-12-31 23:59:59.999999Z'::timestamptz"


def _nearest(compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
    # Not greatest(), which would pass over NULL.
    clamped = f"CASE WHEN {sql} < {_FIRST} THEN {_FIRST} WHEN {sql} > {_LAST} THEN {_LAST}"
    return f"{clamped} ELSE {sql} END", (*params, *params, *params)


def always_readable(field: _F) -> _F:
    """Let ``field`` read what SQL has written beyond Python's times as the nearest of these.

    Pulls and claims do so too: a single moment at infinity would stop every page that shows it.
    Not by a class of its own: Django takes no fields of two classes in one expression, and Now() is
    of its own class.
    """
    field.select_format = _nearest  # type: ignore[method-assign]  # as if it were a method
    return field


class CreatedAtField(_DateTimeField):
    """When the row was inserted, by the database's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("db_default", Now())
        kwargs.setdefault("editable", False)
        super().__init__(*args, **kwargs)
        always_readable(self)


def moment_of(microseconds: int, using: str | None) -> datetime:
    """Return the moment so many microseconds after 1970, as Django reads it from ``using``."""
    moment = EPOCH + timedelta(0, 0, microseconds)
    if settings.USE_TZ:
        return moment
    return moment.astimezone(_zone(connections[using or DEFAULT_DB_ALIAS])).replace(tzinfo=None)


def microseconds_of(moment: datetime, using: str | None) -> int:
    """Return how many microseconds after 1970 a moment is that Django read from ``using``."""
    read = aware(moment, connections[using or DEFAULT_DB_ALIAS])
    return (read - EPOCH) // timedelta(microseconds=1)


def aware(moment: datetime, connection: "BaseDatabaseWrapper") -> datetime:
    """Return a moment that ``connection`` read; where ``USE_TZ`` is off, it comes without a zone.

    The second of two equal times comes with its fold, so this loses nothing.
    """
    if timezone.is_aware(moment):
        return moment
    return moment.replace(tzinfo=_zone(connection)).astimezone(UTC)


def database_now(using: str) -> datetime:
    """Return what time it is by the database's clock."""
    connection = connections[using]
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement_timestamp()")
        return aware(cursor.fetchone()[0], connection)


def _zone(connection: "BaseDatabaseWrapper") -> ZoneInfo:
    """Return the zone of the server's times; where ``USE_TZ`` is off, no visitor's changes it."""
    return ZoneInfo(connection.timezone_name)
