"""Which tasks an operator means: the filters that all verbs of tasks share."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db.models import Q
from django.db.models.functions import Now

from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.states import FINAL, TaskState
from kanthorq_django.management.arguments import count, duration, event_id
from kanthorq_django.management.lookup import find_consumers, find_streams
from kanthorq_django.management.times import format_duration
from kanthorq_django.models import Task
from kanthorq_django.models.task import TaskQuerySet

LIMIT_MAX = 10_000_000

STATES = {state.name.lower(): Q(state=state) for state in TaskState} | {
    "stuck": Q(state=TaskState.RUNNING, schedule_at__lte=Now()),
    "final": Q(state__in=FINAL),
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was asked for; falsy when nothing narrows it down."""

    consumers: list[str]
    streams: list[str]
    states: list[str]
    resource_keys: list[str]
    events: list[UUID]
    subject: str | None
    older_than: timedelta | None
    limit: int | None

    def __bool__(self) -> bool:
        # A limit chooses how many, not which; and everything is older than zero seconds.
        return any(
            (
                self.consumers,
                self.streams,
                self.states,
                self.resource_keys,
                self.events,
                self.subject,
                self.older_than,
            )
        )

    def told(self) -> dict[str, Any]:
        """Return it for the audit."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return given | {"older_than": self.older_than and format_duration(self.older_than)}

    def tasks(self, using: str) -> TaskQuerySet:
        """Return the tasks, the oldest first, without the limit.

        Raises CommandError for an unknown consumer or stream.
        """
        tasks = Task.objects.using(using).order_by("pk")
        if self.consumers:
            tasks = tasks.filter(consumer__in=find_consumers(self.consumers, using))
        if self.streams:
            tasks = tasks.filter(consumer__stream__in=find_streams(self.streams, using))
        return self._by_columns(tasks)

    def _by_columns(self, tasks: TaskQuerySet) -> TaskQuerySet:
        if self.states:
            tasks = tasks.filter(_any_of(self.states))
        if self.resource_keys:
            tasks = tasks.filter(resource_key__in=self.resource_keys)
        if self.events:
            tasks = tasks.filter(event__in=self.events)
        if self.subject:
            tasks = tasks.filter(event__subject__startswith=self.subject)
        if self.older_than:
            tasks = tasks.filter(created_at__lt=Now() - self.older_than)
        return tasks


def add_filters(parser: ArgumentParser, *, limit: int | None) -> None:
    """Declare the filters; ``limit`` is the default of ``--limit``, None where a verb moves all."""
    filters = parser.add_argument_group("filters", "Which tasks; all of them must apply.")
    filters.add_argument("ids", nargs="*", type=event_id, metavar="EVENT", help="event ids")
    _add_repeatable(filters, "--event", "events", "EVENT", "an event id", type=event_id)
    _add_repeatable(filters, "--consumer", "consumers", "NAME", "of this consumer")
    _add_repeatable(filters, "--stream", "streams", "NAME", "of this stream's consumers")
    _add_repeatable(
        filters, "--state", "states", "STATE", f"{', '.join(STATES)}", choices=tuple(STATES)
    )
    _add_repeatable(
        filters, "--resource-key", "resource_keys", "KEY", "about this resource", type=_text
    )
    filters.add_argument(
        "--subject", type=_text, metavar="PREFIX", help="whose subject begins like this"
    )
    filters.add_argument(
        "--older-than", type=duration, metavar="DURATION", help="made before, such as 2h or 7d"
    )
    filters.add_argument(
        "--limit",
        type=count(1, LIMIT_MAX),
        default=limit,
        metavar="N",
        help=f"at most so many{'' if limit else ' that it moves'}, the oldest first; "
        f"default: {limit or 'all'}",
    )


def selection_of(options: Mapping[str, Any]) -> Selection:
    """Return the selection that the parsed options of ``add_filters()`` make."""
    events = list(dict.fromkeys([*options["ids"], *options["events"]]))
    others = [field.name for field in fields(Selection) if field.name != "events"]
    return Selection(events=events, **{name: options[name] for name in others})


def _add_repeatable(
    filters: Any, option: str, dest: str, metavar: str, what: str, **kwargs: Any
) -> None:
    filters.add_argument(
        option,
        dest=dest,
        action="append",
        default=[],
        metavar=metavar,
        help=f"{what}; repeatable",
        **kwargs,
    )


def _text(text: str) -> str:
    """An empty shell variable must not select everything; no subject or key is unprintable."""
    if not text:
        raise ArgumentTypeError("it is empty, which would select everything.")
    if not text.isprintable():
        raise ArgumentTypeError(f"{quoted(text)} holds a character that is not printable.")
    return text


def _any_of(states: list[str]) -> Q:
    chosen = Q()
    for state in states:
        chosen |= STATES[state]
    return chosen
