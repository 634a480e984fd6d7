"""Why events that somebody names have no task among those that are chosen."""

from collections.abc import Iterator, Sequence
from uuid import UUID

from kanthorq_django.domain.amounts import listed, plural
from kanthorq_django.models import Event, Task

SHOWN = 3  # ids for one reason

UNKNOWN = "Unknown"
WITHOUT = "Without a task yet (not pulled, or selected by no consumer)"
LEFT_OUT = "Left out by the other filters"


def reasons(events: Sequence[UUID], using: str) -> Iterator[str]:
    """Yield each reason that holds for any of ``events``, with the events."""
    known = set(Event.objects.using(using).filter(pk__in=events).values_list("pk", flat=True))
    tasks = Task.objects.using(using).filter(event__in=events)
    # A task may have outlived its event.
    pulled = set(tasks.values_list("event_id", flat=True))
    by_reason: dict[str, list[str]] = {UNKNOWN: [], WITHOUT: [], LEFT_OUT: []}
    for event in events:
        reason = LEFT_OUT if event in pulled else WITHOUT if event in known else UNKNOWN
        by_reason[reason].append(str(event))
    for reason, ids in by_reason.items():
        if ids:
            yield f"{reason}: {plural(len(ids), 'event')} {listed(ids, shown_max=SHOWN)}."
