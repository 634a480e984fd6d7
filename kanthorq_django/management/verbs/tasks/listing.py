"""``kanthorq tasks list``: one line for each task."""

from argparse import ArgumentParser
from typing import Any

from kanthorq_django.domain.states import TaskState
from kanthorq_django.management.times import format_moment
from kanthorq_django.management.verbs.tasks.selection import add_filters, selection_of
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Task

LIMIT = 50
EVENT_DELETED = "(the event was deleted)"
HEADERS = ("EVENT", "CONSUMER", "STATE", "ATTEMPTS", "DUE OR ENDED", "RESOURCE KEY", "SUBJECT")


class List(Verb):
    """Without bodies and errors, which ``show`` prints."""

    help = "List tasks, the oldest first, or the newest."
    description = (
        f"At most {LIMIT} without --limit. DUE OR ENDED is when a task may be claimed next: its\n"
        "due time, the end of its back-off or of its lease; for a final task, when it ended."
    )
    examples = (
        "tasks list --consumer refunds --state discarded",
        "tasks list --subject order. --older-than 2h --limit 1000 --json",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print a JSON array")
        parser.add_argument("--newest", action="store_true", help="the newest first")
        add_filters(parser, limit=LIMIT)

    def run(self, *, json: bool, newest: bool, **options: Any) -> None:
        selection = selection_of(options)
        chosen = (
            selection.tasks(self.database)
            .select_related("consumer__stream")
            .with_events(without=("body", "metadata"))
            .defer("attempted_errors", "result")
        )
        if newest:
            chosen = chosen.reverse()
        limit = selection.limit or LIMIT
        tasks = list(chosen[: limit + 1])
        if json:
            self.console.json([_as_json(task) for task in tasks[:limit]])
        else:
            self.console.table(HEADERS, list(map(_row, tasks[:limit])), numbers={"ATTEMPTS"})
        if len(tasks) > limit:
            self.console.note(f"There are more than {limit:,}; raise --limit to see them.")


def _row(task: Task) -> tuple[str, ...]:
    event = task.known_event
    return (
        str(task.event_id),
        task.consumer.name,
        TaskState(task.state).name.lower(),
        f"{task.attempt_count}/{task.consumer.attempt_max}",
        format_moment(task.finalized_at or task.schedule_at),
        task.resource_key,
        EVENT_DELETED if event is None else event.subject,
    )


def _as_json(task: Task) -> dict[str, Any]:
    event = task.known_event
    return {
        "event": task.event_id,
        "consumer": task.consumer.name,
        "stream": task.consumer.stream.name,
        "subject": None if event is None else event.subject,
        "resource_key": task.resource_key,
        "state": TaskState(task.state).name.lower(),
        "attempt_count": task.attempt_count,
        "schedule_at": task.schedule_at,
        "cancel_requested_at": task.cancel_requested_at,
        "finalized_at": task.finalized_at,
        "created_at": task.created_at,
    }
