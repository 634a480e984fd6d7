"""``KANTHORQ = {…}`` in settings.py: one dict, every key optional, all of them here."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

from django.conf import settings as django_settings
from django.core.signals import setting_changed

from kanthorq_django.domain.amounts import counted
from kanthorq_django.domain.names import similar_names
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import ConfigurationError

SECRET_KEYS = (
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "token",
    "authorization",
    "cookie",
    "credential",
    "api_key",
    "access_key",
    "private_key",
    "card",
    "cvc",
    "cvv",
    "iban",
    "pin",
    "otp",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every key with its default; the comment says what it bounds."""

    CONCURRENCY: int = 10  # handlers that one worker process runs at a time
    BATCH_SIZE: int = 1_000  # tasks that one pull or claim leases at most
    PAGE_SIZE: int = 2_000  # events that one pull reads at most, matching or not
    GROUP_COMMIT: int = 1  # tasks of one atomic=True subscriber that may share a transaction
    POLL_INTERVAL: timedelta = timedelta(seconds=1)  # between looks when nothing wakes a worker
    SHUTDOWN_TIMEOUT: timedelta = timedelta(seconds=30)  # for running handlers after SIGTERM
    LISTEN: bool = True  # workers wait for notifications; off behind PgBouncer
    LISTEN_DATABASE: str | None = None  # alias for LISTEN alone, past a pooler; None: the tasks'
    NOTIFY: bool = True  # publishers wake idle workers after their commit
    BODY_SIZE_MAX: int = 262_144  # bytes of one event's body
    METADATA_SIZE_MAX: int = 16_384  # bytes of one event's metadata as JSON
    RESULT_SIZE_MAX: int = 262_144  # bytes of a handler's result as JSON
    DEPTH_MAX: int = 100  # levels of a body's, metadata's or result's JSON; at most 500
    PUBLISH_MAX: int = 1_000_000  # events of one publish_many()
    HOPS_MAX: int | None = None  # from event to event through handlers; None: not counted
    FILTERS_MAX: int = 64  # includes, and as many excludes, of one consumer
    ERRORS_MAX: int = 20  # newest errors kept in a task's history
    ERROR_SIZE_MAX: int = 16_384  # characters kept of one error's traceback
    AUDIT_RETENTION: timedelta = timedelta(days=365)  # age at which prune deletes audit rows
    ADMIN_CSP: bool = True  # our admin pages carry a strict Content-Security-Policy
    REDACTED_KEYS: tuple[str, ...] = SECRET_KEYS  # whose values pages and terminals do not show
    # Fernet keys: the first encrypts bodies at rest, all decrypt. Never printed.
    BODY_KEYS: tuple[str, ...] = field(default=(), repr=False)


# More would end in an error of PostgreSQL or Python, later and where nobody expects it.
CEILINGS: dict[str, Any] = {
    "CONCURRENCY": 1_000,
    "BATCH_SIZE": 10_000,
    "PAGE_SIZE": 1_000_000,
    "GROUP_COMMIT": 10_000,
    "POLL_INTERVAL": timedelta(days=1),
    "SHUTDOWN_TIMEOUT": timedelta(days=1),
    "BODY_SIZE_MAX": 268_435_456,  # PostgreSQL takes 1 GiB, of which hex needs two digits a byte
    "METADATA_SIZE_MAX": 134_217_728,  # jsonb ends at 256 MiB
    "RESULT_SIZE_MAX": 134_217_728,
    "DEPTH_MAX": 500,  # Python's own recursion ends at a thousand
    "PUBLISH_MAX": 1_000_000_000,
    "HOPS_MAX": 1_000_000,
    "FILTERS_MAX": 1_000,
    "ERRORS_MAX": 1_000,
    "ERROR_SIZE_MAX": 1_048_576,
    "AUDIT_RETENTION": timedelta(days=36_500),
}
_NEVER_SHOWN = frozenset({"BODY_KEYS"})  # keys whose values no message may show


def problems(declared: object) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do) for each fault of the setting ``KANTHORQ``."""
    if not isinstance(declared, dict):
        yield f"KANTHORQ is {type(declared).__name__}, not a dict.", "Write KANTHORQ = {}."
        return
    known = {each.name: each for each in fields(Settings)}
    for key, value in declared.items():
        if key not in known:
            yield f"KANTHORQ has no key {quoted(key)}.", _suggestion(key, known)
        elif problem := _value_problem(key, known[key].type, value):
            shown = "wrong" if key in _NEVER_SHOWN else quoted(value)
            yield f"KANTHORQ[{key!r}] is {shown}; {problem}.", _usual(known[key])


def _suggestion(key: object, known: dict[str, Any]) -> str:
    near = similar_names(key.upper(), known, count=1) if isinstance(key, str) else []
    return f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(sorted(known))}."


def _usual(known: Any) -> str:
    """Return a key's default and ceiling as a hint: the wheel holds no documentation to look in."""
    ceiling = CEILINGS.get(known.name)
    most = "" if ceiling is None else f", and {_amount(ceiling)} the most"
    return f"{quoted(known.default)} is the default{most}."


def _amount(ceiling: timedelta | int) -> str:
    return counted(ceiling.days, "day") if isinstance(ceiling, timedelta) else f"{ceiling:,}"


def _value_problem(key: str, wanted: object, value: Any) -> str | None:
    is_right, problem = _TYPES[wanted]
    if not is_right(value):
        return problem
    ceiling = CEILINGS.get(key)
    if ceiling is None or value is None or value <= ceiling:
        return None
    return f"it must be at most {_amount(ceiling)}"


_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (
        lambda value: type(value) is int and value > 0,
        "it must be a whole number above 0",
    ),
    int | None: (
        lambda value: value is None or (type(value) is int and value > 0),
        "it must be a whole number above 0, or None",
    ),
    bool: (lambda value: type(value) is bool, "it must be True or False"),
    timedelta: (
        lambda value: isinstance(value, timedelta) and value > timedelta(0),
        "it must be a datetime.timedelta above zero",
    ),
    str | None: (
        lambda value: value is None or isinstance(value, str),
        "it must be a database alias or None",
    ),
    tuple[str, ...]: (
        lambda value: (
            isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        ),
        "it must be a list of strings",
    ),
}


@functools.cache
def get_settings() -> Settings:
    """Return the project's settings over the defaults.

    Raises ConfigurationError naming the first key that is unknown or of the wrong type.
    """
    declared = getattr(django_settings, "KANTHORQ", {})
    for problem, hint in problems(declared):
        raise ConfigurationError(f"{problem} {hint}")
    frozen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in declared.items()
    }
    return Settings(**frozen)


def _forget(*, setting: str, **_: Any) -> None:
    if setting == "KANTHORQ":
        get_settings.cache_clear()


setting_changed.connect(_forget, dispatch_uid="kanthorq_django.conf")
