"""Ways to lose a connection, and a handler that waits meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.worker import warden
from tests.proxy import Proxy
from tests.worker.working import PATIENCE, default_database


class Gated:
    """A handler that waits until the test lets it go on."""

    def __init__(self, **options: Any) -> None:
        self.is_inside, self.gate = threading.Event(), threading.Event()
        self.cancelled: list[bool] = []

        @subscribe("gated.>", stream="work", consumer="gated", **options)
        def handle(message: Message) -> None:
            self.is_inside.set()
            self.gate.wait(PATIENCE)
            self.cancelled.append(message.cancelled)


def end(pids: set[int]) -> None:
    with connection.cursor() as cursor:
        for pid in pids:
            cursor.execute("SELECT pg_terminate_backend(%s)", [pid])


def cut_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "CANCEL_AFTER", 0.3)
    monkeypatch.setattr(warden, "CUT_AFTER", 0.5)


@contextmanager
def behind_a_proxy() -> Iterator[Proxy]:
    connection.ensure_connection()
    info = connection.connection.info
    with (
        Proxy((info.host, info.port)) as proxy,
        default_database(HOST=proxy.host, PORT=str(proxy.port)),
    ):
        yield proxy
