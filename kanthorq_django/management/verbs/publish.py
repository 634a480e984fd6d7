"""``kanthorq publish``: one event from the command line."""

import json
import sys
from argparse import ArgumentParser
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from django.core.management.base import CommandError
from django.db import transaction

from kanthorq_django import publish
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.names import near_names
from kanthorq_django.domain.quoting import printable
from kanthorq_django.management.arguments import moment
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Stream
from kanthorq_django.models.publishing.body import encode_json

STDIN = "-"


class Publish(Verb):
    """Prints the event id alone, so that a script can keep it."""

    changes = True
    help = "Publish one event and print its id."
    description = (
        "BODY is stored as it is given: a text as UTF-8, stdin (-) and files byte by byte.\n"
        "--json and --text check it first. A stream is made by its first event."
    )
    examples = (
        "publish order.paid '{\"order\": 17}' --json --stream orders",
        "publish report.ready - --stream reports < report.pdf",
        "publish order.reminded --resource-key order-17 --schedule-at 2026-12-24T18:00+01:00",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("subject", metavar="SUBJECT", help="such as order.paid")
        body = parser.add_mutually_exclusive_group()
        body.add_argument(
            "body", metavar="BODY", nargs="?", default=None, help="text, or - for stdin"
        )
        body.add_argument("--file", type=Path, metavar="PATH", help="file that holds the body")
        kind = parser.add_mutually_exclusive_group()
        kind.add_argument("--json", action="store_true", help="the body must be JSON")
        kind.add_argument("--text", action="store_true", help="the body must be UTF-8")
        parser.add_argument("--stream", default="default", help="default: %(default)s")
        parser.add_argument("--metadata", metavar="JSON", default="{}", help="a JSON object")
        parser.add_argument("--resource-key", metavar="KEY", default="", help="what it is about")
        parser.add_argument(
            "--idempotency-key", metavar="KEY", help="publish once: a known key inserts nothing"
        )
        parser.add_argument(
            "--schedule-at", type=moment, metavar="TIME", help="no task of it starts earlier"
        )

    def run(
        self,
        *,
        subject: str,
        body: str | None,
        stream: str,
        metadata: str,
        resource_key: str,
        idempotency_key: str | None,
        schedule_at: datetime | None,
        **options: Any,
    ) -> None:
        content = _content(body, **options)
        parsed = _json(metadata.encode(errors="surrogatepass"), "--metadata")
        known = set(Stream.objects.using(self.database).values_list("name", flat=True))
        with transaction.atomic(using=self.database):
            Stream.objects.using(self.database).register(stream)  # what is made is told below
            event = publish(
                subject,
                content,
                stream=stream,
                metadata=parsed,
                resource_key=resource_key,
                idempotency_key=idempotency_key,
                schedule_at=schedule_at,
                using=self.database,
            )
            counts = {"published": int(event.created)}
            order = self.order(subject=subject, stream=stream, resource_key=resource_key)
            order.record("events.publish", using=self.database, counts=counts, ids=[event.pk])
        self.done = f"The event {event.pk} was published"
        self._report(event.pk, is_new=event.created)
        if known and stream not in known:
            near = near_names(stream, sorted(known))
            self.console.warn(f"This made the stream {stream!r}; {near}")

    def _report(self, event_id: UUID, *, is_new: bool) -> None:
        if not is_new:
            self.console.note("The idempotency key is known; this is the event stored under it:")
        self.console.line(str(event_id))


def _content(
    body: str | None,
    *,
    file: Path | None,
    json: bool,
    text: bool,
    **_: Any,
) -> Any:
    """Return what is to be published, as ``publish()`` takes it."""
    if file is None and body != STDIN and not json:
        return body or ""
    given = _bytes(body, file)
    if json:
        # Checked as a value, and stored as given: published as a value, a string would lose
        # its quotes, and numbers their digits.
        encode_json("body", _json(given, "The body"), size_max=sys.maxsize)
    return _utf8(given) if text else given


def _bytes(body: str | None, file: Path | None) -> bytes:
    if file is None and body != STDIN:
        return (body or "").encode(errors="surrogatepass")
    limit = get_settings().BODY_SIZE_MAX
    given = _stdin(limit + 1) if file is None else _file(file, limit + 1)
    if len(given) > limit:
        raise CommandError(
            f"The body has more than {limit:,} bytes, the limit (KANTHORQ['BODY_SIZE_MAX'])."
        )
    return given


def _stdin(size_max: int) -> bytes:
    if sys.stdin is None:
        raise CommandError("The body cannot be read: stdin is closed.")
    return sys.stdin.buffer.read(size_max)


def _file(path: Path, size_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size_max)
    except (OSError, ValueError) as error:  # the latter for NUL in a path
        raise CommandError(f"The body cannot be read: {printable(str(error), 200)}.") from error


def _utf8(given: bytes) -> str:
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"The body is not UTF-8: {error}.") from error


def _json(given: bytes, what: str) -> Any:
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{what} is not JSON: {error}.") from error
