"""What is known of a connection: whether its server may keep statements, and which it keeps.

Django prepares no statements, so that it works behind poolers. But the server takes longer to plan
a pull than to run it.
"""

import functools
import itertools
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import psycopg
from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader, Transformer
from psycopg.pq import ConnStatus

# Uses of a connection before it is asked whether it leads to the server itself: one that serves a
# single request would not repay the question.
USES_BEFORE = 5

_BAD = ConnStatus.BAD
_ENCODING, _UTF8 = b"client_encoding", b"UTF8"
_HAS_PIPELINES = psycopg.Pipeline.is_supported()  # libpq has had them since version 14


class Detached(NamedTuple):
    """What values are adapted by, without the connection, which may be closed by then.

    Loaders of psycopg 3.2 and 3.3.0 that are written in C crash the process on a closed one.
    """

    adapters: AdaptersMap
    connection: None = None


# What text is to PostgreSQL; Django reads jsonb as text, too.
_TEXTS = ("text", "varchar", "bpchar", "name", "jsonb")


def is_utf8(raw: "psycopg.Connection[Any]") -> bool:
    """Tell whether text travels on ``raw`` as UTF-8: unless the project sets another encoding."""
    try:
        return raw.pgconn.parameter_status(_ENCODING) == _UTF8
    except psycopg.OperationalError:  # it is closed, and nobody can tell
        return True


def encoding_of(raw: "psycopg.Connection[Any]") -> str:
    """Return the name of Python's codec for text that travels on ``raw``."""
    encoding = raw.info.encoding
    # With SQL_ASCII, which psycopg calls ascii, the server converts nothing.
    return "utf-8" if encoding == "ascii" else encoding


def detached(raw: "psycopg.Connection[Any]") -> Detached:
    """Return what values that ``raw`` has just got are adapted by, also once it is closed."""
    if is_utf8(raw):
        return Detached(raw.adapters)
    adapters, loader = AdaptersMap(raw.adapters), _text_loader(encoding_of(raw))
    for name in _TEXTS:
        adapters.register_loader(name, loader)
    return Detached(adapters)


@functools.cache
def _text_loader(encoding: str) -> type[Loader]:
    """Return what decodes text; psycopg's own would have to ask the connection how."""

    class TextLoader(Loader):
        def load(self, data: Buffer) -> str:
            return str(data, encoding)

    return TextLoader


class Prepared(NamedTuple):
    """A statement that a server keeps: its name there, and those of its parameters in order."""

    name: bytes
    params: tuple[str, ...]


class _Adaptation(threading.local):
    """What values are adapted by, one for each thread: it remembers what it was last used for."""

    def __init__(self, adapters: AdaptersMap) -> None:
        self.transformer = Transformer(Detached(adapters))


class Session:
    """What has been learnt of a connection; not the connection itself, or it would never go."""

    def __init__(self, raw: "psycopg.Connection[Any]") -> None:
        self.use_count = 0
        self.is_direct: bool | None = None  # leads to the server itself
        self.prepared: dict[str, Prepared] = {}
        self.numbers = itertools.count()  # for names; none twice, as the server may know some yet
        self.adaptation = _Adaptation(raw.adapters)


_KEY = "_kanthorq_session"


def session_of(raw: "psycopg.Connection[Any]") -> Session:
    """Return what is known of ``raw``, as long as it lives."""
    held = vars(raw)  # a dictionary of weak references takes longer than all else that is asked
    session = held.get(_KEY)
    if session is None:
        session = held[_KEY] = Session(raw)
    found: Session = session
    return found


def adaptation_of(raw: "psycopg.Connection[Any]") -> Any:
    """Return what decodes what ``raw`` has just got; its encoding may be another one later."""
    return session_of(raw).adaptation.transformer if is_utf8(raw) else Transformer(detached(raw))


def may_bind(connection: BaseDatabaseWrapper, session: Session, *, is_lasting: bool) -> bool:
    """Tell whether statements may be bound to what the server keeps, on ``connection`` now.

    Asks the server once whether it is the one that answers, at once if the connection
    ``is_lasting``.
    """
    raw = connection.connection
    pgconn = raw.pgconn
    if pgconn.status == _BAD or pgconn.pipeline_status:
        return False
    if session.is_direct is None:
        session.is_direct = _learnt(connection, session, is_lasting=is_lasting)
    return bool(
        session.is_direct
        and not connection.execute_wrappers
        and not (connection.force_debug_cursor or settings.DEBUG)
        and pgconn.parameter_status(_ENCODING) == _UTF8  # else as psycopg does it
    )


def _learnt(connection: BaseDatabaseWrapper, session: Session, *, is_lasting: bool) -> bool | None:
    """Find out whether the server may keep statements; None until it is worth the question.

    It is done wherever the connection leads to the server itself: a pooler hands out process ids
    of its own. Not where the project sets ``OPTIONS["prepare_threshold"]``: None forbids it, and
    with a number psycopg prepares by itself, and deallocates ours along with its own. Nor where
    its pool resets connections: what is lost would be missed in the middle of a transaction.
    """
    raw, options = connection.connection, connection.settings_dict["OPTIONS"]
    pool = options.get("pool")
    is_reset = isinstance(pool, Mapping) and "reset" in pool
    is_ordinary = issubclass(raw.cursor_factory, psycopg.ClientCursor)
    if "prepare_threshold" in options or is_reset or not (is_ordinary and _HAS_PIPELINES):
        return False
    session.use_count += 1
    if session.use_count < USES_BEFORE and not is_lasting:
        return None
    with connection.wrap_database_errors:
        return is_direct(raw)


def is_direct(raw: "psycopg.Connection[Any]") -> bool:
    """Ask whether the connection leads to the server itself, and not to a pooler before it."""
    found = psycopg.ClientCursor(raw).execute("SELECT pg_backend_pid()").fetchone()
    return found == (raw.info.backend_pid,)
