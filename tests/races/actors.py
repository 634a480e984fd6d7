"""Two workers or operators, each a thread that keeps a connection of its own."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from django.db import connection, connections

from kanthorq_django.models import Consumer
from kanthorq_django.models.delivery import claim
from tests.concurrency import DEADLINE_SECONDS

R = TypeVar("R")


class Actor:
    """Does one thing after the other, on its own connection."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pid = self.do(_backend_pid)

    def __repr__(self) -> str:
        return self.name

    def start(self, work: Callable[[], R]) -> "Future[R]":
        return self._pool.submit(work)

    def do(self, work: Callable[[], R]) -> R:
        return self.start(work).result(DEADLINE_SECONDS)

    def start_until_blocked(self, work: Callable[[], R]) -> "Future[R]":
        """Start ``work``; return when it is done, or waits for a lock of the caller's."""
        future = self.start(work)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not future.done() and not self._is_blocked():
            assert time.monotonic() < deadline, f"{self} neither ends nor waits for a lock"
            time.sleep(0.001)
        return future

    def leave(self) -> None:
        self.do(connections.close_all)
        self._pool.shutdown()

    def _is_blocked(self) -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_blocking_pids(%s) <> '{}'", [self._pid])
            return bool(cursor.fetchone()[0])


@contextmanager
def two_actors() -> Iterator[tuple[Actor, Actor]]:
    first, second = Actor("first"), Actor("second")
    try:
        yield first, second
    finally:
        first.leave()
        second.leave()


class InterruptedConsumer:
    """Claims as ``consumer`` does, with a step between choosing the tasks and leasing them."""

    def __init__(self, consumer: Consumer, step: Callable[[], object]) -> None:
        self._consumer, self._step = consumer, step
        self._patch = mock.patch.object(claim, "_claim", self._step_and_claim)

    def claim(self, limit: int) -> list[Any]:
        self._patch.start()
        return list(self._consumer.claim(limit))

    def _step_and_claim(self, *given: Any) -> Any:
        self._patch.stop()  # once is enough
        self._step()
        return claim._claim(*given)


def _backend_pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])
