"""``kanthorq tasks show``: all that is known of a task, its errors and its event's body."""

import base64
import json as jsons
import math
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from typing import Any

from django.core.management.base import CommandError

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.failures import recorded
from kanthorq_django.domain.redaction import REPLACEMENT, redact
from kanthorq_django.domain.secret_keys import first_mention
from kanthorq_django.domain.states import TaskState
from kanthorq_django.exceptions import UndecodableEvent
from kanthorq_django.management.times import format_moment, format_recorded
from kanthorq_django.management.verbs.tasks.absence import reasons
from kanthorq_django.management.verbs.tasks.listing import EVENT_DELETED
from kanthorq_django.management.verbs.tasks.selection import Selection, add_filters, selection_of
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Event, Task

LIMIT = 10
TEXT_MAX = 2_000  # characters of a body that are printed
BYTES_MAX = 64  # of a body that is no text
TEXTS = ("error", "stack")  # of a failure
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Show(Verb):
    """Prints what a terminal can take: control characters of a body are escaped."""

    help = "Show tasks with their events, attempts and errors."
    description = (
        f"At most {LIMIT} without --limit. Bodies may be confidential: they are printed, without\n"
        "the values of KANTHORQ['REDACTED_KEYS']. Exits with status 1 if no task matches."
    )
    examples = (
        "tasks show 0198c2b4-7a30-7c1e-b0a5-3f4d1c9e2a11",
        "tasks show --consumer refunds --state discarded --limit 1 --json",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print a JSON array")
        add_filters(parser, limit=LIMIT)

    def run(self, *, json: bool, **options: Any) -> None:
        selection = selection_of(options)
        if not selection:
            raise CommandError("Say which tasks: give event ids or another filter.")
        chosen = selection.tasks(self.database).select_related("consumer__stream")
        tasks = list(chosen.with_events()[: selection.limit])
        if json:
            self.console.json([_as_json(task) for task in tasks])
        else:
            self._print_all(tasks)
            self._explain(selection, tasks)
        if not tasks:
            sys.exit(1)

    def _print_all(self, tasks: Sequence[Task]) -> None:
        for number, task in enumerate(tasks):
            if number:
                self.console.line("")
            self._print(task)

    def _explain(self, selection: Selection, tasks: Sequence[Task]) -> None:
        """Say why events that were named have no task here; it may be what is looked for."""
        if not tasks:
            self.console.note("No task matches.")
        if len(tasks) < (selection.limit or math.inf):
            shown = {task.event_id for task in tasks}
            missing = [event for event in selection.events if event not in shown]
            for reason in reasons(missing, self.database):
                self.console.note(reason)

    def _print(self, task: Task) -> None:
        self.console.heading(f"{task.consumer.name}: task {task.pk}")
        for name, value in _facts(task):
            self.console.line(f"  {name:<16} {value}")
        for error in _errors(task):
            verb, attempt = (str(error.get(name, "-")) for name in ("verb", "attempt"))
            at = format_recorded(error.get("at"))
            self.console.line(f"  {verb} {attempt:<9} {at}  {error['error']}")
            for line in error["stack"].splitlines():
                self.console.line(f"    {line}")


def _facts(task: Task) -> Iterator[tuple[str, str]]:
    event = task.known_event
    yield "event", str(task.event_id)
    yield "subject", EVENT_DELETED if event is None else event.subject
    yield "stream", task.consumer.stream.name
    yield "resource key", task.resource_key or "-"
    if event is not None:
        yield "published", format_moment(event.created_at)
        yield "metadata", _told(event.metadata)
        yield "body", _body_text(event)
    yield "state", TaskState(task.state).name.lower()
    yield "attempts", f"{task.attempt_count} of {task.consumer.attempt_max}"
    if task.finalized_at is None:  # of a lease that was ended it says when it would have been over
        yield "due", format_moment(task.schedule_at)
    yield "lease epoch", str(task.lease_epoch)
    yield "last attempt", format_moment(task.attempted_at)
    yield "cancel requested", format_moment(task.cancel_requested_at)
    yield "cancel attempts", str(task.cancel_attempt_count)
    yield "ended", format_moment(task.finalized_at)
    yield "result", _told(task.result)


def _as_json(task: Task) -> dict[str, Any]:
    known = {"id": task.event_id, "stream": task.consumer.stream.name}
    return {
        "event": known | _event_json(task.known_event),
        "consumer": task.consumer.name,
        "resource_key": task.resource_key,
        "state": TaskState(task.state).name.lower(),
        "schedule_at": task.schedule_at,
        "lease_epoch": task.lease_epoch,
        "attempt_count": task.attempt_count,
        "attempt_max": task.consumer.attempt_max,
        "attempted_at": task.attempted_at,
        "attempted_errors": list(_errors(task)),
        "cancel_requested_at": task.cancel_requested_at,
        "cancel_attempt_count": task.cancel_attempt_count,
        "result": jsons.loads(_told(task.result)),
        "finalized_at": task.finalized_at,
        "created_at": task.created_at,
    }


def _event_json(event: Event | None) -> dict[str, Any]:
    """Return what an event tells; of one that was deleted the same, without values."""
    body, encoding = (None, "deleted") if event is None else _portable(event)
    return {
        "subject": getattr(event, "subject", None),
        "metadata": jsons.loads(_told(getattr(event, "metadata", None))),
        "body": body,
        "body_encoding": encoding,
        "idempotency_key": getattr(event, "idempotency_key", None),
        "schedule_at": getattr(event, "schedule_at", None),
        "created_at": getattr(event, "created_at", None),
    }


def _errors(task: Task) -> Iterator[dict[str, Any]]:
    """Yield the failures, the oldest first, whatever was stored; without secret values."""
    keys = get_settings().REDACTED_KEYS
    for entry in recorded(task.attempted_errors):
        others = {name: value for name, value in entry.items() if name not in TEXTS}
        texts = {name: redact(entry[name], keys, is_error=True) for name in TEXTS}
        yield entry | jsons.loads(_told(others)) | texts


def _told(value: Any) -> str:
    """Return ``value`` as JSON without the values that the settings keep from terminals."""
    return _redacted(jsons.dumps(value, ensure_ascii=False))


def _redacted(text: str) -> str:
    return redact(text, get_settings().REDACTED_KEYS)


def _portable(event: Event) -> tuple[str | None, str]:
    try:
        body = bytes(event.body)
    except UndecodableEvent:
        return None, "undecodable"
    text = _text(body)
    if text is not None:
        return _redacted(text), "utf-8"
    if _mentions_a_secret(body):
        return None, "redacted"
    return base64.b64encode(body).decode(), "base64"


def _text(body: bytes) -> str | None:
    """Return the text, or None for bytes that are none; a secret may hide between controls."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) and _mentions_a_secret(body) else text


def _mentions_a_secret(body: bytes) -> bool:
    return first_mention(body, get_settings().REDACTED_KEYS) is not None


def _body_text(event: Event) -> str:
    try:
        body = bytes(event.body)
    except UndecodableEvent as error:
        return str(error)
    return f"{_readable(body)} ({len(body):,} bytes)"


def _readable(body: bytes) -> str:
    text = _text(body)
    if text is None:
        return _dump(body[:BYTES_MAX], len(body))
    shown = _redacted(text)
    return f"{shown[:TEXT_MAX]}{' …' if len(shown) > TEXT_MAX else ''}"


def _dump(start: bytes, size_bytes: int) -> str:
    """Return bytes in hexadecimal up to the first secret key."""
    end = first_mention(start, get_settings().REDACTED_KEYS)
    if end is not None:
        return f"{start[:end].hex(' ')} {REPLACEMENT}"
    return f"{start.hex(' ')}{' …' if size_bytes > len(start) else ''}"
