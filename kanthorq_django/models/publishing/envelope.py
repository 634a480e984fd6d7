"""What stands on an event beside its body: subject, stream, keys, due time, id.

Everything is checked here, and not by SQL: an error of the database would break the caller's
transaction, one of ours leaves it usable.
"""

from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import TypeVar
from uuid import UUID

from django.conf import settings as django_settings
from django.utils import timezone

from kanthorq_django.conf import get_settings
from kanthorq_django.domain import subjects
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.domain.moments import moment_problem, readable
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import InvalidEvent, InvalidSubject

E = TypeVar("E")

KEY_SIZE_MAX = 255  # characters of a resource key or an idempotency key
VERSION_BITS = 0xF << 76 | 0b11 << 62  # version and variant, as in RFC 9562
UUID_VERSION_7 = 7 << 76 | 0b10 << 62


def settle_id(given: object, others: set[int]) -> UUID:
    """Return the id to publish under, a new one for None, Django's idiom for a copy; note it.

    Raises InvalidEvent if it is not an id as publishing makes them, or one of ``others``, which
    are integers: Python hashes those at once.
    """
    settled = uuid7() if given is None else given
    if not (isinstance(settled, UUID) and settled.int & VERSION_BITS == UUID_VERSION_7):
        raise InvalidEvent(f"id must be a UUIDv7, not {quoted(given)}; leave it out.")
    count = len(others)
    others.add(settled.int)
    if len(others) == count:
        raise InvalidEvent(f"id {settled} stands twice in one batch.")
    return settled


def gathered(events: Iterable[E]) -> list[E]:
    """Return ``events`` as a list. Raises InvalidEvent as soon as there are too many."""
    limit = get_settings().PUBLISH_MAX
    given = list(islice(events, limit + 1))
    if len(given) > limit:
        raise InvalidEvent(
            f"More than {limit:,} events are published at once, the limit "
            "(KANTHORQ['PUBLISH_MAX']); nothing was written."
        )
    return given


def check_subject(subject: object) -> None:
    """Raise InvalidSubject unless ``subject`` may be published."""
    if problem := subjects.subject_problem(subject):
        raise InvalidSubject(f"The subject {quoted(subject)} is not valid: {problem}.")


def check_key(name: str, key: object, *, size_min: int) -> None:
    """Raise InvalidEvent unless ``key`` is printable and has ``size_min`` to 255 characters."""
    if not isinstance(key, str):
        raise InvalidEvent(f"{name} must be a str, not {type(key).__name__}.")
    if not size_min <= len(key) <= KEY_SIZE_MAX:
        raise InvalidEvent(
            f"{name} has {len(key)} characters, it must have {size_min} to {KEY_SIZE_MAX}."
        )
    if not key.isprintable():
        raise InvalidEvent(f"{name} {quoted(key)} holds a character that is not printable.")


def settle_schedule_at(moment: object) -> datetime | None:
    """Return ``moment``, None or such that it equals the one given and PostgreSQL can read it.

    Raises InvalidEvent unless it can be stored and read back.
    """
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise InvalidEvent(f"schedule_at must be a datetime, not {type(moment).__name__}.")
    if problem := moment_problem(moment):
        raise InvalidEvent(f"schedule_at {problem}.")
    if django_settings.USE_TZ and timezone.is_naive(moment):
        raise InvalidEvent(
            f"schedule_at {moment} is naive; use an aware datetime, as USE_TZ is on."
        )
    return readable(moment)
