"""The command line: its arguments one by one, and its parser as a whole."""

import contextlib
import io
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from django.core.management.base import CommandError

from kanthorq_django.exceptions import InvalidBody
from kanthorq_django.management import arguments
from kanthorq_django.management.commands.kanthorq import Command
from kanthorq_django.management.commands.runworker import Command as RunWorker
from kanthorq_django.management.times import format_duration, parse_duration
from kanthorq_django.management.verbs.grants import Grantee, grantee, name
from kanthorq_django.management.verbs.publish import _content as publish_content
from kanthorq_django.models.maintenance.privileges import revocation, statements
from tests.fuzz.oracle import refusals
from tests.fuzz.reader import PIECES, Reader

TYPES: tuple[Callable[[str], Any], ...] = (
    arguments.duration,
    arguments.event_id,
    arguments.moment,
    arguments.count(1, 10_000),
    arguments.fraction,
    grantee,
    name,
)
SPELLINGS = (
    *("7d", "1h30m", "90s", "0", "1", "5", ".", "-", "+", "e", "_", ":", "T", "Z", "2026-12-24"),
    *("18:00", "+01:00", "9" * 400, "nan", "inf", "0x1f", "worker=", "٣", "w"),
    *PIECES,
)
WORDS = (
    *("publish", "tasks", "list", "show", "cancel", "resume", "release", "reset", "schedules"),
    *("prune", "grants", "health", "stats", "sync", "rebase", "reencrypt", "--help", "--version"),
    *("--consumer", "--state", "--stream", "--subject", "--older-than", "--limit", "--event"),
    *("--json", "--yes", "--all", "--dry-run", "--running", "--reason", "--database", "--batch"),
    *("--metadata", "--schedule-at", "--file", "--resource-key", "--verbosity", "--settings"),
    *("default", "7d", "discarded", "order.paid", "-", "--", "-v", "3", "@args", "--jso", "=x"),
)


def spellings(reader: Reader) -> None:
    """One argument is a value of its type, or the reason why not is one sentence."""
    text = reader.text(SPELLINGS, 4)
    for kind in TYPES:
        with refusals(ArgumentTypeError):
            parsed = kind(text)
            if isinstance(parsed, Grantee):
                _assert_quoted(parsed)
    with refusals(ValueError):
        duration = parse_duration(text)
        assert format_duration(duration).isascii()


def lines(reader: Reader) -> None:
    """A command line is parsed, or refused by Django's parser, which says how it is used."""
    words = [
        reader.text(SPELLINGS, 3) if reader.chance(4) else reader.pick(WORDS)
        for _ in range(reader.below(8))
    ]
    command = reader.pick((Command, RunWorker))()
    parser = command.create_parser("manage.py", "kanthorq")
    # As call_command() has it: what is wrong is raised.
    parser.called_from_command_line = False
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(CommandError, SystemExit):
        parser.parse_args(words)


def published_bodies(reader: Reader) -> None:
    """The body of ``kanthorq publish`` is content, or the reason why not is one sentence."""
    with refusals(CommandError, InvalidBody):
        publish_content(
            reader.text(("{", "}", "[", "]", '"', ",", ":", "1", "e", "\\u", "d800", *PIECES), 12),
            file=None,
            json=reader.chance(),
            text=reader.chance(),
        )


def _assert_quoted(given: Grantee) -> None:
    """Fail unless the name stands in the SQL as one quoted identifier and nothing else."""
    quoted = '"' + given.name.replace('"', '""') + '"'
    for statement in (
        revocation(given.name, "public"),
        *statements(given.role, given.name, "public"),
    ):
        assert statement.endswith(f" {quoted};"), statement
