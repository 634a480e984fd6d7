"""For the tests of projects: run the handlers of what a test has published, in its own thread.

Works inside Django's ``TestCase``, whose transaction never commits, as well as outside of one.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import UUID

from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.asyncio import async_unsafe
from psycopg.pq import TransactionStatus

from kanthorq_django import signals, sql
from kanthorq_django.domain import subjects
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, lease
from kanthorq_django.models.claim import lease_due
from kanthorq_django.models.lease import Lease
from kanthorq_django.models.leased import Leased, pulled_by, tell_of
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.call import Round, calls
from kanthorq_django.worker.endings import (
    Ending,
    HandBack,
    after_error,
    after_interrupt,
    after_return,
    concluded,
)
from kanthorq_django.worker.executor import acall, call
from kanthorq_django.worker.flight import Flight

BATCH_SIZE = 1_000

_Run = tuple[int, bool]  # of a task by its id: whether by its cancellation handler


@async_unsafe("drain() cannot be called from an async context; use `await adrain(…)`.")
def drain(*consumers: str) -> int:
    """Handle all that is due for ``consumers`` (none named: for all); return how many tasks.

    Also what handlers publish meanwhile. A failing handler is nacked as in a worker, its
    error stands in ``task.attempted_errors``; what waits for a retry is left to wait. So is what
    snoozed, even if it is due again at once: until the next call.
    """
    _check_names(consumers)
    using: str = router.db_for_write(Consumer)
    return _Drain(sync(consumers or None, using=using), using).run()


def _check_names(consumers: Iterable[object]) -> None:
    for name in consumers:
        if not isinstance(name, str):
            raise TypeError(f"drain() takes names of consumers one by one, not {quoted(name)}.")


async def adrain(*consumers: str) -> int:
    """Do what ``drain()`` does, from a coroutine."""
    return await sync_to_async(drain)(*consumers)


class _Drain:
    """One call of ``drain()``: what it has handled, and what it leaves for the next one."""

    def __init__(self, consumers: Sequence[Consumer], using: str) -> None:
        for consumer in consumers:
            consumer.turns.group_size = find(consumer.name).group_size
        self._consumers, self._using = consumers, using
        self._acknowledger = Acknowledger(using, written=lambda leases: None)
        self._handled: dict[int, list[UUID]] = {consumer.pk: [] for consumer in consumers}
        self._snoozed: set[_Run] = set()
        # Leased to the end, although they have snoozed: claims would find them and nothing else.
        self._asleep: set[Lease] = set()

    def run(self) -> int:
        while due := [
            (consumer, flights)
            for consumer in self._consumers
            if (flights := self._lease_awake(consumer))
        ]:
            for consumer, flights in due:
                self._handle(consumer, flights)
        if self._asleep:
            lease.hand_back(list(self._asleep), self._using)
        return sum(map(len, self._handled.values()))

    def _handle(self, consumer: Consumer, flights: Sequence[Flight]) -> None:
        self._handled[consumer.pk] += [flight.leased.event_id for flight in flights]
        for each in calls(flights, find(consumer.name)):
            for round_ in each.rounds:
                self._snoozed |= _snoozed(_settled(round_, self._acknowledger))

    def _lease_awake(self, consumer: Consumer) -> list[Flight]:
        """Lease what is due; return what of it has not snoozed."""
        while flights := self._lease_due(consumer):
            awake = [each for each in flights if _run_of(each.message) not in self._snoozed]
            self._asleep |= {each.lease for each in flights} - {each.lease for each in awake}
            if awake:
                return awake
        return []

    def _lease_due(self, consumer: Consumer) -> list[Flight]:
        leased: list[Task | Leased] = []
        if connections[self._using].in_atomic_block:
            leased += self._pull_uncommitted(consumer)
        else:
            leased += consumer.pull(BATCH_SIZE)
        # Also of what was just pulled and waits for its turn.
        leased += lease_due(consumer, BATCH_SIZE, CLAIMABLE)
        subscription = find(consumer.name)
        return [Flight(each, subscription, time.monotonic()) for each in leased]

    def _pull_uncommitted(self, consumer: Consumer) -> list[Leased]:
        params = {
            # A handler may delete its task, which is all that tells.
            "handled": self._handled[consumer.pk],
            "consumer_id": consumer.pk,
            "includes": subjects.to_regex(consumer.subject_includes),
            "excludes": subjects.to_regex(consumer.subject_excludes),
        }
        leased = pulled_by(consumer, sql.result(self._using, "pull_uncommitted", params))
        tell_of(signals.pulled, consumer, leased)
        return leased


def _snoozed(endings: Iterable[Ending]) -> set[_Run]:
    return {
        _run_of(ending.message)
        for ending in endings
        if isinstance(ending, HandBack) and ending.is_snooze
    }


def _run_of(message: Message) -> _Run:
    return message.lease.task_id, message.is_cancellation


def _settled(round_: Round, acknowledger: Acknowledger) -> list[Ending]:
    """Handle a round and write how it ends; return that."""
    with _committing():
        endings = _handle(round_)
    with _committing():
        acknowledger.write(endings)
    return endings


@contextmanager
def _committing() -> Iterator[None]:
    """Let each statement outside of a handler's own blocks last, or undo only itself.

    For a worker it is committed at once. Here it is in the transaction of a test.
    """
    open_now = [
        each
        for each in connections.all(initialized_only=True)
        if each.in_atomic_block and each.vendor in _WITH_SAVEPOINTS
    ]
    with ExitStack() as stack:
        for connection in open_now:
            stack.enter_context(_Committer(connection))
        yield


_WITH_SAVEPOINTS = {"postgresql", "sqlite", "mysql"}  # and standard SQL for them
_SAVEPOINT_VERBS = ("savepoint", "savepoint_commit", "savepoint_rollback")


class _Committer:
    """Stands in for the commits of one connection: a savepoint that is renewed by each."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection
        self._depth = len(connection.atomic_blocks)
        self._before = {
            name: held
            for name, held in vars(connection).items()
            if name in {"close", "savepoint_ids", *_SAVEPOINT_VERBS}
        }

    def __enter__(self) -> None:
        self._run("SAVEPOINT")
        self._connection.execute_wrappers.append(self._execute)
        self._connection.savepoint_ids = _BlockSavepoints(self._connection)  # type: ignore[assignment]  # Django's too
        for verb in _SAVEPOINT_VERBS:
            setattr(self._connection, verb, self._within_blocks(getattr(self._connection, verb)))
        self._connection.close = self._do_not_close  # type: ignore[method-assign]

    def __exit__(self, *raised: object) -> None:
        for verb in ("close", *_SAVEPOINT_VERBS):
            delattr(self._connection, verb)
        vars(self._connection).update(self._before)
        self._connection.execute_wrappers.remove(self._execute)
        self._take_back_what_failed()
        self._run("RELEASE SAVEPOINT")

    def _execute(
        self, execute: Callable[..., Any], statement: Any, params: Any, many: bool, context: Any
    ) -> Any:
        """Run a statement; Django's own ones for a block are run just outside of it."""
        if not self._is_outside or self._is_in_block_of_psycopg:
            return execute(statement, params, many, context)
        self._commit()  # a COPY has told nothing of its end
        if _begins_with(statement, "SAVEPOINT"):
            # Ours lies above: what a block swallowed undoes all of it, and not its RELEASE alone.
            self._run("RELEASE SAVEPOINT")
        try:
            found = execute(statement, params, many, context)
            if _begins_with(statement, "SAVEPOINT", "ROLLBACK TO", "RELEASE"):
                self._run("SAVEPOINT")  # ours went with that of the block
            return found
        finally:
            self._commit()

    @property
    def _is_outside(self) -> bool:
        return len(self._connection.atomic_blocks) <= self._depth

    @property
    def _is_in_block_of_psycopg(self) -> bool:
        return bool(getattr(self._connection.connection, "_num_transactions", False))

    def _within_blocks(self, verb: Callable[..., str | None]) -> Callable[..., str | None]:
        """Return a verb of savepoints that does nothing outside of blocks, as in a worker."""

        # Given is nothing, or what savepoint() returned: none there, for the others to do nothing.
        def run(*savepoint: str | None) -> str | None:
            is_for_nothing = savepoint == (None,) if savepoint else self._is_outside
            return None if is_for_nothing else verb(*savepoint)

        return run

    def _do_not_close(self) -> None:
        """Keep the connection, on which is what the test has written.

        A worker's would be made anew, and a block of its handler be lost with it.
        """
        if not self._is_outside:
            self._connection.needs_rollback = True

    def _commit(self) -> None:
        self._take_back_what_failed()
        self._run("RELEASE SAVEPOINT")
        self._run("SAVEPOINT")

    def _take_back_what_failed(self) -> None:
        connection = self._connection
        connection.needs_rollback = False  # the block around us is the test's: a worker has none
        raw = connection.connection
        is_aborted = (
            connection.vendor == "postgresql"
            and raw.info.transaction_status == TransactionStatus.INERROR
        )
        if is_aborted:
            self._run("ROLLBACK TO SAVEPOINT")

    def _run(self, verb: str) -> None:
        """Run a statement of ours past wrappers, and past the log of queries."""
        with self._connection.cursor() as cursor:
            cursor.cursor.execute(f"{verb} kanthorq_drain")


class _BlockSavepoints(list[str | None]):
    """The savepoints of open blocks, of which each outermost one of a handler has one.

    To a worker it is a transaction, whatever failed before it, and ``savepoint=False`` or not.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        super().__init__(connection.savepoint_ids)
        self._connection = connection
        self._depth = len(self)

    def append(self, savepoint: str | None) -> None:
        if savepoint is None and len(self) == self._depth:
            savepoint = type(self._connection).savepoint(self._connection)
        super().append(savepoint)


def _begins_with(statement: object, *verbs: str) -> bool:
    return isinstance(statement, str) and statement.startswith(verbs)


def _handle(round_: Round) -> list[Ending]:
    """Do what ``execute()`` and ``aexecute()`` do, on the connections of the test to the end."""
    for flight in round_:
        flight.start()
    result, error = async_to_sync(_acall)(round_) if round_[0].is_async else _call(round_)
    if isinstance(error, asyncio.CancelledError) and round_[0].is_async:
        return after_interrupt(error, *round_)
    if error is not None:
        return after_error(round_, error)
    for flight in round_:
        _endure_if_written(flight.message)
    return concluded(after_return, round_, result)


def _call(round_: Round) -> tuple[Any, BaseException | None]:
    try:
        return call(round_), None
    except KeyboardInterrupt:
        raise  # it is the test that is to end
    except BaseException as error:  # noqa: BLE001  # as execute() does
        return None, error


async def _acall(round_: Round) -> tuple[Any, BaseException | None]:
    try:
        return await acall(round_), None
    except BaseException as error:
        task = asyncio.current_task()
        is_interrupted = isinstance(error, asyncio.CancelledError) and task and task.cancelling()
        if isinstance(error, KeyboardInterrupt) or is_interrupted:
            raise  # as above
        return None, error


def _endure_if_written(message: Message) -> None:
    """Ask the row where no commit will ever tell: a test drains inside its own transaction."""
    is_undecided = message.has_verdict() and not message.is_settled()
    if is_undecided and connections[message.using].in_atomic_block and not message.is_open():
        message.endure()
