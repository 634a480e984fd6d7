"""Commits, inside the transaction of a test that never commits: savepoints stand in for them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus


@contextmanager
def committing() -> Iterator[None]:
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
            # Ours goes on top of the block's: an error that the block swallows then takes back all
            # that the block did, where else only its RELEASE would fail.
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

        # savepoint() is called without arguments, the other two with what it returned: None outside
        # of blocks, for which they do nothing.
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
