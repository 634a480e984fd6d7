"""The one thread in which Django's ORM serves coroutines: whether it is free, and its connections.

Whose handlers they are, and what becomes of them meanwhile, is in coroutine_lane.py.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django.worker.connections.database_errors import is_unavailable
from kanthorq_django.worker.connections.own_connections import forget
from kanthorq_django.worker.connections.scarcity import REFUSED_PAUSE, are_scarce, pool_size
from kanthorq_django.worker.connections.suspicion import are_held
from kanthorq_django.worker.connections.upkeep import (
    leave_connections,
    note_failure,
    refresh_connections,
    spare_connections,
)
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.warden import Bounded

STUCK_AFTER = 2.0  # seconds that a call for the thread may wait for others


class OrmThread:
    """What a lane of coroutines knows of that thread, which asgiref starts and others use too."""

    def __init__(
        self, bounded: Bounded, is_idle: Callable[[], bool], freed: Callable[[], None]
    ) -> None:
        """Ask ``is_idle`` whether no coroutine runs; call ``freed`` when it is stuck no longer."""
        self.using = DEFAULT_DB_ALIAS  # what they use next
        self.are_suspect = False  # its sessions
        self._bounded = bounded
        self._is_idle = is_idle
        self._freed = freed
        self._refreshes: set[asyncio.Task[bool]] = set()  # the loop has only weak references
        self._refresh: asyncio.Task[bool] | None = None  # the one that has not begun yet
        self._queued_at: float | None = None  # when it was put in line

    @property
    def is_stuck(self) -> bool:
        """Tell whether the thread is kept for so long that no coroutine may start.

        Those that need it would only wait for it until their time is up, attempt after attempt.
        """
        queued_at = self._queued_at
        return queued_at is not None and time.monotonic() > queued_at + STUCK_AFTER

    async def is_ready(self) -> bool:
        """Tell whether a round may begin; its attempt would be lost on what it cannot help.

        Where connections are scarce it waits until there is one. Else it does not, so that who
        needs none is not kept by those who do.
        """
        refresh = self.line_up_refresh()
        await asyncio.sleep(0)  # so it is the first in line; and others may have the round
        if self.is_stuck:
            return False
        if not are_scarce():
            return True
        await asyncio.wait({refresh}, timeout=STUCK_AFTER)
        if refresh.done() and not refresh.cancelled() and refresh.result():
            return True
        await asyncio.sleep(REFUSED_PAUSE)
        return False

    def line_up_refresh(self) -> asyncio.Task[bool]:
        """Have connections refreshed before the next handlers use them.

        First in line for the thread. One that has not begun yet will do for all who come meanwhile.
        """
        if (refresh := self._refresh) is None:
            refresh = self._refresh = asyncio.create_task(self._queue_refresh())
            self._refreshes.add(refresh)
            refresh.add_done_callback(self._forget_refresh)
        return refresh

    async def close_connections(self) -> None:
        with contextlib.suppress(RuntimeError):  # the interpreter is exiting, as under a reloader
            await sync_to_async(connections.close_all)()

    def _forget_refresh(self, refresh: asyncio.Task[bool]) -> None:
        """Line up another one if this has never begun, as somebody cancelled it."""
        self._refreshes.discard(refresh)
        if self._refresh is refresh:
            self._refresh = self._queued_at = None

    async def _queue_refresh(self) -> bool:
        """Refresh connections; False if there is none to be had."""
        self._queued_at = time.monotonic()
        try:
            await sync_to_async(self._renew)()
        except (asyncio.CancelledError, RuntimeError):  # of the latter see close_connections()
            return False
        except BaseException as error:  # of a receiver, as any other
            note_failure(error)
            if not is_unavailable(error):
                logger.exception("A connection could not be made ready for coroutines.")
            return False
        return True

    def _renew(self) -> None:
        self._begin_refresh()  # whoever comes from now on needs one of its own
        # Another coroutine may be between two reads of a cursor.
        if are_suspect := self.are_suspect and not are_held(self._bounded):
            self.are_suspect = False
        try:
            # First: it goes by how long they have rested.
            refresh_connections(self._bounded, using=self.using, are_suspect=are_suspect)
        finally:
            leave_connections()
            if self._is_idle():
                spare_connections()
        # Not the only one of a pool: nobody could write a verdict, or extend a lease, meanwhile.
        if are_scarce() and not self._is_idle() and pool_size(connections[self.using]) > 1:
            self._connect(connections[self.using])

    def _begin_refresh(self) -> None:
        was_stuck = self.is_stuck
        self._refresh = self._queued_at = None
        if was_stuck:
            self._freed()

    def _connect(self, connection: BaseDatabaseWrapper) -> None:
        try:
            connection.ensure_connection()
        except BaseException:
            forget(connection)  # what a receiver began to set up is not to be used
            raise
