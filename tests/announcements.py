"""Who listens to notifications in tests, and what a process remembers of those it sent."""

import psycopg
import pytest
from django.db import connection

from kanthorq_django import publish, sql
from kanthorq_django.models import Stream
from kanthorq_django.models.publishing import notifications
from kanthorq_django.models.publishing.notifications import channel
from kanthorq_django.sql.session import USES_BEFORE

SENTINEL = "sentinel"
PATIENCE = 20.0  # seconds


class Ear:
    """Listens on a raw connection to the streams ``a`` and ``b``."""

    def __init__(self, ear: psycopg.Connection, mouth: psycopg.Connection) -> None:
        self._ear, self._mouth = ear, mouth
        self._names = {channel(Stream.objects.register(name).pk): name for name in ("a", "b")} | {
            SENTINEL: SENTINEL
        }
        for heard in self._names:
            ear.execute(f"LISTEN {heard}".encode())

    def heard(self) -> list[str]:
        """Return the streams that were announced since the last call, in order.

        Notifications arrive in the order of their commits, so one of our own ends the list.
        """
        self._mouth.execute(f"NOTIFY {SENTINEL}".encode())
        streams: list[str] = []
        for notification in self._ear.notifies(timeout=PATIENCE):
            assert notification.payload == ""
            if notification.channel == SENTINEL:
                return streams
            streams.append(self._names[notification.channel])
        raise AssertionError("The sentinel was not heard.")


def raw_connection() -> psycopg.Connection:
    with connection.cursor():
        assert connection.connection is not None
        info = connection.connection.info
    return psycopg.connect(
        host=info.host,
        port=info.port,
        user=info.user,
        password=info.password,
        dbname=info.dbname,
        autocommit=True,
    )


def let_server_keep(stream: str) -> None:
    """Publish into ``stream`` until the server keeps what it is done by."""
    for _ in range(USES_BEFORE + 1):
        publish("order.paid", stream=stream)


def forget_notifications() -> None:
    """Let the next event of every stream be the first one."""
    notifications.pace.cache_clear()
    notifications.announcer.cache_clear()


def let_notifications_fail(patch: pytest.MonkeyPatch, instead: str = "SELECT 1 / 0") -> None:
    """Let those fail that travel with an event: what is done ``instead`` has to."""
    load = sql.load

    def failing(name: str, *, skip_locked: bool = False) -> str:
        return instead if name == "notify" else load(name, skip_locked=skip_locked)

    patch.setattr(sql, "load", failing)
