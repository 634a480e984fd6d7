"""``kanthorq grants``: the SQL that gives database roles what they need, and no more."""

from argparse import ArgumentParser, ArgumentTypeError
from typing import Any, NamedTuple

from kanthorq_django.domain.quoting import quoted
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models.maintenance.privileges import (
    NAME_SIZE_MAX,
    ROLES,
    revocation,
    statements,
)


class Grantee(NamedTuple):
    """A role of ours, and the name of the database role that gets what it needs."""

    role: str
    name: str


class Grants(Verb):
    """Prints and changes nothing: a person reads it, and the owner of the tables runs it."""

    help = "Print SQL that gives database roles the least that they need."
    description = (
        "publisher  publishes, and reads no bodies\n"
        "worker     pulls, handles, publishes, turns schedules; deletes no events\n"
        "viewer     looks at everything but bodies\n"
        "operator   acts on tasks and schedules, deletes consumers and events; audited\n"
        "pruner     runs prune, and reads no bodies\n"
        "The roles have to exist. A person or program that is several of them is granted several.\n"
        "migrate, rebase and reencrypt are for the owner of the tables. Run it again after an\n"
        "upgrade; tables of the project are its own affair."
    )
    examples = (
        "grants | psql -v ON_ERROR_STOP=1 shop",
        "grants publisher=shop_web worker=shop_worker --schema queue",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "roles",
            metavar="ROLE[=NAME]",
            nargs="*",
            type=grantee,
            help="default: all, each under the name kanthorq_ROLE",
        )
        parser.add_argument(
            "--schema", type=name, default="public", help="of the tables; default: %(default)s"
        )

    def run(self, *, roles: list[Grantee], schema: str, **_: Any) -> None:
        chosen_roles = roles or [grantee(role) for role in ROLES]
        self.console.line("BEGIN;")
        for grantee_name in dict.fromkeys(chosen.name for chosen in chosen_roles):
            self.console.line(revocation(grantee_name, schema))
        for chosen in chosen_roles:
            self.console.line(f"-- {chosen.role}")
            for statement in statements(chosen.role, chosen.name, schema):
                self.console.line(statement)
        self.console.line("COMMIT;")


def grantee(text: str) -> Grantee:
    """Return the role that ``worker`` or ``worker=shop_worker`` means."""
    role, equals, given = text.partition("=")
    if role not in ROLES:
        raise ArgumentTypeError(f"{quoted(role)} is no role; use one of {', '.join(ROLES)}.")
    return Grantee(role, name(given if equals else f"kanthorq_{role}"))


def name(text: str) -> str:
    """Return the name of a role or a schema. Raises ArgumentTypeError for what can be none."""
    if not text.isprintable() or not 0 < len(text.encode(errors="replace")) <= NAME_SIZE_MAX:
        raise ArgumentTypeError(
            f"{quoted(text)} must be a name of 1 to {NAME_SIZE_MAX} bytes of printable text."
        )
    return text
