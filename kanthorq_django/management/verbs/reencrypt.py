"""``kanthorq reencrypt``: put stored bodies under the first key, so that old keys can go."""

import sys
from argparse import ArgumentParser
from typing import Any

from kanthorq_django.domain.amounts import counted, listed
from kanthorq_django.management.arguments import count
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models.maintenance.reencryption import BATCH, BATCH_MAX, Reencrypted, reencrypt

BODY = ("body", "bodies")


class Reencrypt(Verb):
    """Exits with status 1 while bodies are left or lost: then no key may go yet."""

    changes = True
    help = "Encrypt all stored bodies with the first of KANTHORQ['BODY_KEYS']."
    description = (
        "For a new key, or for the bodies from before there were keys. Add the new key behind\n"
        "the old one and restart whatever publishes and works, so that everybody can read it; put\n"
        "it first and restart again; run this until it finds nothing; then take the old key away.\n"
        "Bodies that are up to date are left alone. Each batch is a short transaction of its own;\n"
        "interrupt it at any time. Rewritten rows leave dead ones behind, so expect autovacuum to\n"
        "work.\n"
        "--decrypt stores all bodies in the clear again."
    )
    examples = ("reencrypt --dry-run", "reencrypt --yes", "reencrypt --decrypt --yes")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--decrypt", action="store_true", help="store bodies in the clear")
        parser.add_argument(
            "--batch",
            type=count(1, BATCH_MAX),
            default=BATCH,
            metavar="N",
            help="bodies in one transaction; default: %(default)s",
        )
        parser.add_argument("--dry-run", action="store_true", help="count, but change nothing")
        parser.add_argument("--yes", action="store_true", help="do not ask")

    def run(self, *, decrypt: bool, batch: int, dry_run: bool, yes: bool, **_: Any) -> None:
        if not (dry_run or yes):
            self._ask(decrypt=decrypt)
        try:
            done = reencrypt(
                self.database,
                decrypt=decrypt,
                dry_run=dry_run,
                batch=batch,
                order=self.order(decrypt=decrypt),
                on_batch=self._show,
            )
        finally:
            self.console.end_progress()
        self._tell(done, is_dry=dry_run)
        if done.lost or done.left or (dry_run and done.changed):
            sys.exit(1)

    def _ask(self, *, decrypt: bool) -> None:
        what = "Store all bodies in the clear" if decrypt else "Encrypt all bodies anew"
        self.console.confirm(f"{what} in the database {self.database!r}?")

    def _show(self, done: Reencrypted) -> None:
        self.console.progress(done.read, None, f"{_counted(done.read)} read")

    def _tell(self, done: Reencrypted, *, is_dry: bool) -> None:
        word = "would be stored anew" if is_dry else "stored anew"
        self.console.line(f"{done.changed:,} of {_counted(done.read)} {word}")
        if done.left:
            self.console.warn(
                f"Left {_counted(done.left)}, locked or changed meanwhile; run it again."
            )
        if done.lost:
            named = listed([*map(str, done.named)], shown_max=len(done.named), count=done.lost)
            self.console.warn(f"No key opens {_counted(done.lost)}: {named}")


def _counted(bodies: int) -> str:
    return counted(bodies, *BODY)
