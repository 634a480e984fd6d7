"""What people say about a schedule, in code or in a form, and what is wrong with it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.moments import with_offset
from kanthorq_django.domain.names import name_problem
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.recurrence import YEAR_MAX, YEAR_MIN, Recurrence
from kanthorq_django.domain.rules import RecurrenceProblem
from kanthorq_django.exceptions import InvalidSchedule, KanthorqError
from kanthorq_django.models.fields import aware
from kanthorq_django.models.publishing.body import encode_body, encode_metadata
from kanthorq_django.models.publishing.envelope import check_key, check_subject

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from kanthorq_django.models.schedule import Schedule

EXDATES_MAX = 1_000

# The columns that say when a schedule occurs; a change of any other leaves that as it is.
TIMING = frozenset({"rrule", "dtstart", "timezone", "exdates"})
_COLUMN_OF = {"rule": "rrule", "dtstart": "dtstart"}


class Catchup(models.TextChoices):
    """What becomes of occurrences that passed while no worker ran."""

    ALL = "all", _("publish all of them")
    LAST = "last", _("publish the last one")
    NONE = "none", _("leave them out")


class _MomentField(models.DateTimeField):  # type: ignore[type-arg]
    """A moment of a schedule: aware whatever ``USE_TZ`` is, as rules count in moments.

    Written with its offset, too: without one, of a time that comes twice only one can be stored.
    """

    def deconstruct(self) -> Any:
        name, _path, args, kwargs = super().deconstruct()
        return name, "django.db.models.DateTimeField", args, kwargs  # it is the same column

    def from_db_value(
        self, value: datetime | None, _expression: Any, connection: "BaseDatabaseWrapper"
    ) -> datetime | None:
        return None if value is None else aware(value, connection)


# For type checkers, to which a null moment is something else than one that is always there.
MomentField = models.DateTimeField if TYPE_CHECKING else _MomentField


class Definition(NamedTuple):
    """What code says about a schedule."""

    rrule: str
    dtstart: datetime | str  # aware; ISO text of one is taken as well, as exdates are
    timezone: str | ZoneInfo | None
    exdates: Iterable[datetime | str]
    subject: str
    body: Any
    metadata: Mapping[str, Any] | None
    stream: str
    resource_key: str
    catchup: str

    def columns(self) -> dict[str, Any]:
        """Return the columns of a schedule but its stream, in the form in which they are stored.

        Raises InvalidSchedule or InvalidEvent for what has no such form.
        """
        limits = get_settings()
        given = self._asdict()
        del given["stream"]
        return given | {
            "dtstart": _moment("dtstart", self.dtstart),
            "timezone": _zone_name(self.timezone),
            "exdates": stored_exdates(self.exdates),
            "body": encode_body(self.body, size_max=limits.BODY_SIZE_MAX),
            "metadata": encode_metadata(
                {} if self.metadata is None else self.metadata, size_max=limits.METADATA_SIZE_MAX
            ),
        }


def stored_exdates(moments: object) -> list[str]:
    """Return ``moments`` sorted, as ISO 8601 in UTC.

    Raises InvalidSchedule for what is none, and as soon as there are too many.
    """
    if isinstance(moments, str | bytes) or not isinstance(moments, Iterable):
        raise InvalidSchedule(f"exdates takes a list of aware datetimes, not {quoted(moments)}.")
    given = list(islice(moments, EXDATES_MAX + 1))
    if len(given) > EXDATES_MAX:
        raise InvalidSchedule(f"exdates has more than {EXDATES_MAX:,} moments, the limit.")
    return [moment.isoformat() for moment in sorted({_exdate(each) for each in given})]


def zone_of(name: object) -> ZoneInfo:
    """Return the time zone called ``name``. Raises InvalidSchedule if there is none."""
    try:
        if isinstance(name, str):
            return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise InvalidSchedule(f"{quoted(name)} is not the name of a time zone.")


def recurrence_of(schedule: "Schedule") -> Recurrence:
    """Return the rule, ready to be asked. Raises InvalidSchedule or RecurrenceProblem."""
    _check_list(schedule.exdates)
    exdates = frozenset(
        _moment("exdates", given).replace(microsecond=0) for given in schedule.exdates
    )
    # Rules count in whole seconds.
    dtstart = _moment("dtstart", schedule.dtstart).replace(microsecond=0)
    return Recurrence(schedule.rrule, dtstart, zone_of(schedule.timezone), exdates)


def readable_exdates(schedule: "Schedule") -> list[datetime]:
    """Return the moments left out; none if the column holds anything else, as a page shows it."""
    try:
        _check_list(schedule.exdates)
        return [_moment("exdates", given) for given in schedule.exdates]
    except InvalidSchedule:
        return []


def occurrence_metadata(schedule: "Schedule", moment: datetime) -> dict[str, str]:
    """Return what an event tells of the occurrence that it was published for."""
    return {"schedule": schedule.name, "occurrence": moment.isoformat()}


def problems(
    schedule: "Schedule", columns: Set[str] | None = None
) -> Iterator[tuple[str, KanthorqError]]:
    """Yield each of ``columns`` that is wrong, or any, with the error that says so.

    What says when it occurs is wrong or right together.
    """
    if columns is not None and not columns.isdisjoint(TIMING):
        columns = columns | TIMING
    is_timed = columns is None or columns >= TIMING
    for column, check in _CHECKS.items():
        if columns is not None and column not in columns:
            continue
        try:
            check(schedule)
        except KanthorqError as error:
            is_timed = is_timed and column not in TIMING
            yield column, error
    if is_timed:
        yield from _recurrence_problems(schedule)


def _recurrence_problems(schedule: "Schedule") -> Iterator[tuple[str, KanthorqError]]:
    try:
        recurrence_of(schedule)
    except RecurrenceProblem as problem:
        text = str(problem)
        yield _COLUMN_OF[problem.about], InvalidSchedule(f"{text[:1].upper()}{text[1:]}.")


def _check_name(schedule: "Schedule") -> None:
    if problem := name_problem(schedule.name):
        raise InvalidSchedule(f"{quoted(schedule.name)} cannot name a schedule: {problem}.")


def _check_catchup(schedule: "Schedule") -> None:
    if schedule.catchup not in Catchup.values:
        raise InvalidSchedule(
            f"catchup must be one of {', '.join(Catchup.values)}, not {quoted(schedule.catchup)}."
        )


def _encoded_body(schedule: "Schedule") -> bytes:
    return encode_body(schedule.body, size_max=get_settings().BODY_SIZE_MAX)


def _check_metadata(schedule: "Schedule") -> None:
    size_max = get_settings().METADATA_SIZE_MAX
    metadata = encode_metadata(schedule.metadata, size_max=size_max)
    # With what each event is given beside it.
    encode_metadata(metadata | occurrence_metadata(schedule, datetime.max), size_max=size_max)  # noqa: DTZ901  # its size


def _check_exdates(schedule: "Schedule") -> None:
    _check_list(schedule.exdates)
    stored_exdates(schedule.exdates)


def _check_list(exdates: object) -> None:
    if not isinstance(exdates, list):
        raise InvalidSchedule(f"exdates must be a list, not {type(exdates).__name__}.")


_CHECKS: dict[str, Callable[[Any], object]] = {
    "name": _check_name,
    "subject": lambda schedule: check_subject(schedule.subject),
    "body": _encoded_body,
    "metadata": _check_metadata,
    "resource_key": lambda schedule: check_key("resource_key", schedule.resource_key, size_min=0),
    "catchup": _check_catchup,
    "timezone": lambda schedule: zone_of(schedule.timezone),
    "dtstart": lambda schedule: _moment("dtstart", schedule.dtstart),
    "exdates": _check_exdates,
}


# How columns of a schedule without problems are stored that may have been given in other forms: in
# those that ``schedule()`` takes.
STORED_FORMS: dict[str, Callable[[Any], object]] = {
    "dtstart": lambda schedule: _moment("dtstart", schedule.dtstart),
    "exdates": lambda schedule: stored_exdates(schedule.exdates),
    "body": _encoded_body,
}

# What is checked, and not what moves, or what the database sees to by itself.
DEFINING = TIMING.union(_CHECKS)


def _zone_name(given: object) -> object:
    if given is None:
        return settings.TIME_ZONE
    return given.key if isinstance(given, ZoneInfo) else given


def _exdate(given: object) -> datetime:
    """Return ``given`` as a moment in UTC that a rule can have."""
    moment = _moment("exdates", given)
    if not YEAR_MIN <= moment.year <= YEAR_MAX:
        raise InvalidSchedule(f"exdates takes the years {YEAR_MIN} to {YEAR_MAX}, not {moment}.")
    return moment


def _moment(name: str, given: object) -> datetime:
    """Return ``given``, a datetime or its ISO text, as an aware moment in UTC."""
    try:
        moment = datetime.fromisoformat(given) if isinstance(given, str) else given
        if isinstance(moment, datetime) and moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except Exception:  # noqa: BLE001  # no moment, or one of a zone that is foreign code
        moment = None
    if isinstance(moment, datetime) and isinstance(given, str):
        told = f"{quoted(given)} has no offset from UTC: write {with_offset(moment)}, for example"
    else:
        told = (
            f"not {quoted(given)}; such as datetime(2026, 1, 5, 9, "
            "tzinfo=ZoneInfo('Europe/Berlin')), or the ISO text of one: 2026-01-05T09:00+01:00"
        )
    raise InvalidSchedule(f"{name} takes aware datetimes, {told}.")
