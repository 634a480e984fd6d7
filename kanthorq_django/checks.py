"""System checks for what would otherwise fail at 3 a.m.

Those that ask the server run with ``check --database`` and ``migrate``; the others open no
connection. Subscribers that are declared wrongly raise at their import already.
"""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, cast

from django.apps import apps
from django.conf import settings as django_settings
from django.core import checks
from django.core.checks import CheckMessage, Error, Tags, register
from django.db import DEFAULT_DB_ALIAS, connections, router
from django.utils.version import get_version_tuple

from kanthorq_django.conf import Settings, get_settings, problems
from kanthorq_django.domain.subscriptions import registry
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.models import Task
from kanthorq_django.models.maintenance.health import VERSION_MIN
from kanthorq_django.models.publishing.encryption import fernet
from kanthorq_django.worker.connections.scarcity import OWN_THREADS, pool_size

TAG = "kanthorq"
PSYCOPG_MIN = (3, 2)
# Renewal is due at a third of the timeout; what is left must outlast a pause of the process
# or of the server, such as a failover of a pooler or a checkpoint.
VISIBILITY_MIN = timedelta(seconds=3)

# What speaks PostgreSQL's protocol without its transaction snapshots, by its version().
DERIVATIVES = {"CockroachDB": "CockroachDB", "-YB-": "YugabyteDB"}


@register(TAG)
def check_settings(**_: Any) -> Iterator[CheckMessage]:
    """E005: an unknown key of KANTHORQ, or a value of the wrong type."""
    for problem, hint in problems(getattr(django_settings, "KANTHORQ", {})):
        yield Error(problem, hint=hint, id="kanthorq_django.E005")


@register(TAG)
def check_encryption(**_: Any) -> Iterator[CheckMessage]:
    """E009: keys that cannot encrypt bodies."""
    settings = _settings()
    if settings is None or not settings.BODY_KEYS:
        return
    try:
        fernet(settings.BODY_KEYS)
    except ConfigurationError as error:
        yield Error(
            str(error),
            hint="Without usable keys nothing can be published, and sealed bodies stay closed.",
            id="kanthorq_django.E009",
        )


@register(TAG)
def check_engine(**_: Any) -> Iterator[CheckMessage]:
    """E001, E002: tasks without PostgreSQL, or without psycopg 3."""
    alias = _alias()
    if alias not in connections:
        yield Error(
            f"The router sends the tasks to {alias!r}, which is no database of the project.",
            hint=_name_one_of_databases(),
            id="kanthorq_django.E001",
        )
        return
    if not _is_postgresql(alias):
        yield Error(
            f"The database {alias!r}, where the tasks are, is not PostgreSQL.",
            hint="Use django.db.backends.postgresql, or route kanthorq_django's models to it.",
            id="kanthorq_django.E001",
        )
        return
    driver = cast("Any", connections[alias]).Database.__version__.split()[0]
    if get_version_tuple(driver) < PSYCOPG_MIN:
        wanted = ".".join(map(str, PSYCOPG_MIN))
        yield Error(
            f"The database driver is psycopg {driver}; KanthorQ needs {wanted} or later.",
            hint="Install psycopg[binary]; Django prefers it to psycopg2 when both are there.",
            id="kanthorq_django.E002",
        )


@register(TAG)
def check_autocommit(**_: Any) -> Iterator[CheckMessage]:
    """E010: statements that nobody commits."""
    alias = _alias()
    if _is_postgresql(alias) and not connections[alias].settings_dict.get("AUTOCOMMIT", True):
        yield Error(
            f"DATABASES[{alias!r}]['AUTOCOMMIT'] is False; workers commit each of their steps.",
            hint=(
                "Leave AUTOCOMMIT at True, and use ATOMIC_REQUESTS or transaction.atomic() for "
                "transactions."
            ),
            id="kanthorq_django.E010",
        )


@register(TAG)
def check_routing(**_: Any) -> Iterator[CheckMessage]:
    """E007, W002: the tables are apart from each other, or from the business tables."""
    aliases = {
        model.__name__: router.db_for_write(model)
        for model in apps.get_app_config("kanthorq_django").get_models()
    }
    if len(set(aliases.values())) > 1:
        routed = ", ".join(f"{name} to {alias!r}" for name, alias in aliases.items())
        yield Error(
            f"KanthorQ's models are routed to several databases: {routed}.",
            hint="Route the whole app kanthorq_django to one database.",
            id="kanthorq_django.E007",
        )
    elif (alias := _alias()) != DEFAULT_DB_ALIAS and _is_postgresql(alias):
        atomic = [each.consumer for each in registry.all() if each.atomic]
        whose = f" Nor does the atomic=True of {', '.join(atomic)} cover others." if atomic else ""
        yield checks.Warning(
            f"The tasks are in the database {alias!r}, not in {DEFAULT_DB_ALIAS!r}.",
            hint=(
                "Acknowledging and publishing join transactions of that database only: "
                f"transaction.atomic(using={alias!r}).{whose} Silence this if it is intended."
            ),
            id="kanthorq_django.W002",
        )


@register(TAG)
def check_consumers(**_: Any) -> Iterator[CheckMessage]:
    """E006, W001: two handlers for one consumer; leases that are hard to keep."""
    for former, latter in registry.duplicates:
        yield Error(
            f"Two subscribers have the consumer {latter.consumer!r}: {former.place} and "
            f"{latter.place}.",
            hint="A consumer has one handler: give one of them another consumer=….",
            id="kanthorq_django.E006",
        )
    for subscription in registry.all():
        if subscription.visibility_timeout < VISIBILITY_MIN:
            yield checks.Warning(
                f"Consumer {subscription.consumer!r} has a visibility_timeout of "
                f"{subscription.visibility_timeout.total_seconds():g} s, which renewal may miss.",
                hint=(
                    f"Use at least {VISIBILITY_MIN.total_seconds():g} s: a lease is renewed once "
                    "a third of it is over, and a short pause would lose the rest."
                ),
                obj=subscription.place,
                id="kanthorq_django.W001",
            )


@register(TAG)
def check_listening(**_: Any) -> Iterator[CheckMessage]:
    """E008, W004: notifications that cannot arrive."""
    settings = _settings()
    if settings is None or not settings.LISTEN:
        return
    alias = settings.LISTEN_DATABASE or _alias()
    if settings.LISTEN_DATABASE is not None and not _is_postgresql(alias):
        yield Error(
            f"KANTHORQ['LISTEN_DATABASE'] is {alias!r}, which is no PostgreSQL database.",
            hint=_name_one_of_databases(),
            id="kanthorq_django.E008",
        )
    elif _is_postgresql(alias) and connections[alias].settings_dict.get(
        "DISABLE_SERVER_SIDE_CURSORS"
    ):
        yield checks.Warning(
            f"Workers listen on the database {alias!r}, which disables server-side cursors as "
            "for a pooler in transaction mode: that delivers no notifications.",
            hint=(
                "Set KANTHORQ['LISTEN_DATABASE'] to an alias that leads past the pooler, or "
                "KANTHORQ['LISTEN'] to False; polling goes on either way."
            ),
            id="kanthorq_django.W004",
        )


@register(TAG)
def check_pool(**_: Any) -> Iterator[CheckMessage]:
    """W005: a connection pool that is too small for a worker's threads."""
    settings, alias = _settings(), _alias()
    if settings is None or not _is_postgresql(alias):
        return
    size, wanted = pool_size(connections[alias]), settings.CONCURRENCY + OWN_THREADS
    if size < wanted:
        yield checks.Warning(
            f"The connection pool of the database {alias!r} has at most {size} connections; a "
            f"worker needs up to {wanted}.",
            hint=(
                f"Set DATABASES[{alias!r}]['OPTIONS']['pool']['max_size'] to {wanted} or more, "
                "or lower KANTHORQ['CONCURRENCY']: its threads take turns, and nobody listens."
            ),
            id="kanthorq_django.W005",
        )


@register(TAG)
def check_time_zone(**_: Any) -> Iterator[CheckMessage]:
    """W003: naive times, which mean two moments when the clocks are set back."""
    if not django_settings.USE_TZ:
        yield checks.Warning(
            "USE_TZ is off, so the times of events and tasks are naive.",
            hint="Set USE_TZ = True: when clocks are set back, a naive time means two moments.",
            id="kanthorq_django.W003",
        )


@register(TAG, Tags.database)
def check_server(databases: Iterable[str] | None = None, **_: Any) -> Iterator[CheckMessage]:
    """E003, E004: a server that is too old, or only resembles PostgreSQL."""
    alias = _alias()
    if alias not in (databases or ()) or not _is_postgresql(alias):
        return
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT version(), current_setting('server_version_num')::int / 10000")
        text, version = cursor.fetchone()
    yield from server_problems(alias, text, version)


def server_problems(alias: str, text: str, version: int) -> Iterator[CheckMessage]:
    """Yield what is wrong with a server that calls itself ``text``."""
    for mark, name in DERIVATIVES.items():
        if mark in text:
            yield Error(
                f"The database {alias!r} is {name}, not PostgreSQL itself.",
                hint="The cursor needs PostgreSQL's transaction snapshots: events would be lost.",
                id="kanthorq_django.E004",
            )
            return
    if version < VERSION_MIN:
        yield Error(
            f"The database {alias!r} runs PostgreSQL {version}; {VERSION_MIN} is the oldest "
            "supported.",
            hint="Upgrade the server.",
            id="kanthorq_django.E003",
        )


def _alias() -> str:
    return router.db_for_write(Task)


def _is_postgresql(alias: str) -> bool:
    return alias in connections and connections[alias].vendor == "postgresql"


def _name_one_of_databases() -> str:
    return f"Use one of the aliases in DATABASES: {', '.join(map(repr, connections))}."


def _settings() -> Settings | None:
    """Return the settings, or None while check_settings has something to say about them."""
    try:
        return get_settings()
    except ConfigurationError:
        return None
