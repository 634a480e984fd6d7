"""Rows by the names that operators type; a name that is unknown gets near ones in return."""

from collections.abc import Iterable
from typing import TypeVar

from django.core.management.base import CommandError
from django.db import models

from kanthorq_django.domain.names import name_problem, near_names
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.models import Consumer, Schedule, Stream

M = TypeVar("M", Consumer, Schedule, Stream)


def find_consumers(names: Iterable[str], using: str) -> list[Consumer]:
    """Return the consumers called ``names``. Raises CommandError for the first unknown one."""
    return _find(Consumer.objects.using(using).select_related("stream"), names)


def find_schedules(names: Iterable[str], using: str) -> list[Schedule]:
    """Return the schedules called ``names``. Raises CommandError for the first unknown one."""
    return _find(Schedule.objects.using(using).select_related("stream"), names)


def find_streams(names: Iterable[str], using: str) -> list[Stream]:
    """Return the streams called ``names``. Raises CommandError for the first unknown one."""
    return _find(Stream.objects.using(using), names)


def _find(stored: "models.QuerySet[M]", names: Iterable[str]) -> list[M]:
    wanted = list(dict.fromkeys(names))
    # What cannot name a row is not asked for: a byte of another encoding would break the query.
    possible = [name for name in wanted if name_problem(name) is None]
    found = {row.name: row for row in stored.filter(name__in=possible)}
    for name in wanted:
        if name not in found:
            noun = stored.model._meta.verbose_name_raw
            known = list(stored.values_list("name", flat=True))
            raise CommandError(
                f"There is no {noun} {quoted(name)} in the database {stored.db!r}; "
                f"{near_names(name, known)}"
            )
    return [found[name] for name in wanted]
