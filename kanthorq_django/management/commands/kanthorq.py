"""``manage.py kanthorq <verb>``: publish, look, act on tasks, and keep the house."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from django.core.management.base import (
    BaseCommand,
    CommandError,
    CommandParser,
    DjangoHelpFormatter,
)
from django.db import connections, router

from kanthorq_django.management.console import Console
from kanthorq_django.management.refusals import one_sentence
from kanthorq_django.management.verbs import VERBS
from kanthorq_django.management.verbs.verb import Verb, VerbTree
from kanthorq_django.models import Task

INTERRUPTED = 130  # as a shell reports SIGINT


class HelpFormatter(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""


class Command(BaseCommand):
    """Parses, hands over to the verb, and turns refusals into one sentence."""

    help = "Publish events, look at streams and tasks, act on them, and keep the house."

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """Return Django's parser, with the verbs and their examples in its help."""
        return super().create_parser(
            prog_name,
            subcommand,
            **{"epilog": _examples(VERBS), "formatter_class": HelpFormatter, **kwargs},
        )

    def add_arguments(self, parser: CommandParser) -> None:
        _add_verbs(parser, VERBS, "VERB")

    def handle(self, *_: Any, verb: type[Verb], database: str | None, **options: Any) -> None:
        """Run ``verb``; ``options`` are its own."""
        alias = database or router.db_for_write(Task)
        console = Console(self.stdout, self.stderr, self.style)
        with _interrupted_quietly(), one_sentence(alias):
            if connections[alias].vendor != "postgresql":
                raise CommandError(f"The database {alias!r} is not PostgreSQL.")
            _run(verb(console, alias, options.pop("reason", None) or ""), **options)


def _run(verb: Verb, **options: Any) -> None:
    """Run ``verb``. Raises CommandError, or exits, if not all that it printed could be written."""
    try:
        verb.run(**options)
    except BaseException:
        if problem := _unwritten(verb.console):
            verb.console.note(f"Stdout {problem}")
        raise
    if problem := _unwritten(verb.console):
        is_done = verb.changes and not options.get("dry_run")
        raise CommandError(f"{verb.done}, but stdout {problem}" if is_done else f"Stdout {problem}")
    if verb.console.finish():
        sys.exit(1)


def _unwritten(console: Console) -> str:
    """Return the end of a sentence about lost output; empty if the reader just closed the pipe."""
    loss = console.finish()
    if loss is None or isinstance(loss, BrokenPipeError):
        return ""
    return f"could not be written: {loss.strerror or loss}."


def _add_verbs(parser: argparse.ArgumentParser, tree: VerbTree, metavar: str) -> None:
    verbs = parser.add_subparsers(metavar=metavar, required=True, title="verbs")
    for name, verb in tree.items():
        if isinstance(verb, tuple):
            summary, branch = verb
            group = verbs.add_parser(
                name,
                help=summary,
                description=summary,
                epilog=_examples(branch),
                formatter_class=HelpFormatter,
            )
            _add_verbs(group, branch, "VERB")
        else:
            _add_verb(cast("CommandParser", verbs.add_parser(name, **_help(verb))), verb)


def _examples(tree: VerbTree) -> str:
    """Return the first example of each verb, as the end of the help of them all."""
    verbs = (verb for verb in tree.values() if not isinstance(verb, tuple))
    return _epilog(verb.examples[0] for verb in verbs)


def _epilog(examples: Iterable[str]) -> str:
    lines = "\n".join(f"  manage.py kanthorq {example}" for example in examples)
    return f"examples:\n{lines}"


def _help(verb: type[Verb]) -> dict[str, Any]:
    return {
        "help": verb.help,
        "description": f"{verb.help}\n\n{verb.description}",
        "epilog": _epilog(verb.examples),
        "formatter_class": HelpFormatter,
    }


def _add_verb(parser: CommandParser, verb: type[Verb]) -> None:
    parser.set_defaults(verb=verb)
    parser.add_argument(
        "--database",
        choices=tuple(connections),
        help="Alias of the database that holds the events and tasks.",
    )
    verb.add_arguments(parser)
    if verb.changes:
        parser.add_argument("--reason", metavar="TEXT", help="why; kept in the audit")
    _accept_common_options(parser)


def _accept_common_options(parser: CommandParser) -> None:
    """Take Django's own options after the verb too, where one types them.

    Suppressed defaults leave what was given before the verb as it is.
    """
    common = BaseCommand().create_parser("", "")
    for action in common._actions:
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue
        parser._add_action(_without_default(action))


def _without_default(action: argparse.Action) -> argparse.Action:
    action.default, action.help = argparse.SUPPRESS, argparse.SUPPRESS
    return action


@contextmanager
def _interrupted_quietly() -> Iterator[None]:
    """Let Ctrl-C end the command without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
