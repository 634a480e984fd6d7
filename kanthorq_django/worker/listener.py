"""Wakes the worker when a stream has new events, over a connection of its own.

A listener that has gone deaf, behind a pooler or on a half-open connection, raises no error:
it calls itself now and then, and takes a new connection when it does not hear the answer. Behind
a pooler it is called from a session of its own: the pooler may hand a statement of the listener
to the very session that listens, which answers at once, and only that.
Polling goes on all the time, so nothing here is needed for correctness.
"""

import contextlib
import functools
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from kanthorq_django.models.publishing.notifications import CANCEL_CHANNEL, channel
from kanthorq_django.sql.session import is_direct
from kanthorq_django.worker.backoff import Backoff
from kanthorq_django.worker.connections.scarcity import are_scarce
from kanthorq_django.worker.warden import Bounded

CALL_EVERY = 30.0  # seconds between two calls to ourselves
ANSWER_WITHIN = 5.0  # seconds after which an unanswered call means deafness
SLICE = 1.0  # seconds after which a quiet wait looks for calls, and whether connections are scarce
RETRY_LONGEST = 60.0  # seconds: a pooler that keeps us deaf will not let us hear soon


class Listener:
    """A thread that calls ``wake`` with the id of a stream that has new events.

    And ``on_cancel`` for requests to cancel.
    """

    def __init__(
        self,
        using: str,
        stream_ids: Iterable[int],
        wake: Callable[[int], None],
        on_cancel: Callable[[], None],
        bounded: Bounded,
    ) -> None:
        self._using = using
        self._calls: dict[str, Callable[[], None]] = {
            channel(stream_id): functools.partial(wake, stream_id) for stream_id in stream_ids
        }
        self._calls[CANCEL_CHANNEL] = on_cancel
        self._bounded = bounded
        self._stop = threading.Event()
        self._backoff = Backoff("listener", longest=RETRY_LONGEST)
        self._own_channel = f"kanthorq_call_{id(self)}_{time.time_ns()}"
        self._thread = threading.Thread(target=self._run, name="kanthorq-listener", daemon=True)

    def start(self) -> None:
        self._bell, self._ringer = socket.socketpair()  # ends a wait for the server
        self._thread.start()

    def finish(self, seconds: float) -> None:
        self._stop.set()
        with self._ringer, contextlib.suppress(OSError):  # it has ended by itself
            self._ringer.shutdown(socket.SHUT_RDWR)  # also where a child of a handler has it too
        self._thread.join(seconds)

    def _run(self) -> None:
        with self._bell:
            self._keep_listening()

    def _keep_listening(self) -> None:
        while not self._stop.is_set():
            try:
                _refuse_where_scarce()
                with self._connected() as connection:
                    self._listen(connection)
            except BaseException as error:  # noqa: BLE001  # polling goes on, and so does this thread
                self._stop.wait(self._backoff.failed(error))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[BaseDatabaseWrapper]:
        connection = connections.create_connection(self._using)
        connection.connect()
        try:
            # Autocommit: a listener inside a transaction would hold up the notification queue.
            connection.set_autocommit(True)
            yield connection
        finally:
            if connection.connection is not None:
                connection.connection.close()  # in a pool it would go on listening, unread
            connection.close()

    def _listen(self, connection: BaseDatabaseWrapper) -> None:
        is_pooled = self._subscribe(connection)
        for call_out in self._calls.values():
            call_out()  # for what happened before we listened
        call = _Call()
        # What arrives along with an answer is psycopg's.
        connection.connection.add_notify_handler(lambda heard: self._pass_on(heard.channel, call))
        with selectors.DefaultSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            selector.register(connection.connection.fileno(), selectors.EVENT_READ)
            while not self._stop.is_set():
                if call.is_due():
                    call.made()  # first: the answer may come along with the result
                    self._call_ourselves(connection, is_pooled=is_pooled)
                self._hear(connection, call)
                # Not by psycopg, which takes the interpreter's lock ten times a second to wait, and
                # at length after each notification, while those who were woken wait for it.
                selector.select(SLICE)

    def _hear(self, connection: BaseDatabaseWrapper, call: "_Call") -> None:
        """Pass on what has arrived.

        By libpq's own calls: psycopg's notifies() takes longer until it yields the first.
        """
        pgconn = connection.connection.pgconn
        pgconn.consume_input()
        while heard := pgconn.notifies():
            self._pass_on(heard.relname.decode(errors="replace"), call)

    def _pass_on(self, name: str, call: "_Call") -> None:
        if name == self._own_channel:
            call.answered()
            self._backoff.succeeded()
        elif call_out := self._calls.get(name):  # else the project listens to it as well
            call_out()

    def _subscribe(self, connection: BaseDatabaseWrapper) -> bool:
        """Ask for our notifications; return whether a pooler stands between."""
        with self._bounded(connection):
            for name in (*self._calls, self._own_channel):
                connection.connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(name)))
            return not is_direct(connection.connection)

    def _call_ourselves(self, connection: BaseDatabaseWrapper, *, is_pooled: bool) -> None:
        if is_pooled:
            with self._connected() as other:
                self._notify(other)
        else:
            self._notify(connection)

    def _notify(self, connection: BaseDatabaseWrapper) -> None:
        with self._bounded(connection):
            connection.connection.execute("SELECT pg_notify(%s, '')", [self._own_channel])


class _Call:
    """A notification to ourselves, and whether it has come back in time."""

    def __init__(self) -> None:
        self._made_at: float | None = None
        self._answered_at = float("-inf")

    def is_due(self) -> bool:
        """Tell whether to call now. Raises OperationalError when the last call was in vain."""
        _refuse_where_scarce()
        now = time.monotonic()
        if self._made_at is None:
            return now - self._answered_at >= CALL_EVERY
        if now - self._made_at > ANSWER_WITHIN:
            raise _Deaf(
                "notifications do not arrive (a pooler in transaction mode? then set "
                "KANTHORQ['LISTEN'] = False or KANTHORQ['LISTEN_DATABASE']); polling goes on"
            )
        return False

    def made(self) -> None:
        self._made_at = time.monotonic()

    def answered(self) -> None:
        self._made_at, self._answered_at = None, time.monotonic()


def _refuse_where_scarce() -> None:
    if are_scarce():
        raise _Spared(
            "connections are scarce (a pool of less than CONCURRENCY and 5?); polling goes on"
        )


class _Spared(OperationalError):
    """Others need the connection more."""


class _Deaf(OperationalError):
    """Our own call did not come back."""
