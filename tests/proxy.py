"""A network that fails on purpose: a proxy on a unix socket, or on TCP, before PostgreSQL."""

import contextlib
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from django.db import connections
from django.db.backends.postgresql.base import DatabaseWrapper

PORT = 5432  # part of the socket's name only
CHUNK_BYTES = 65_536
GONE_WITHIN = 5.0  # seconds
READY = b"Z\0\0\0\5I"  # what the server says after each transaction


class Fault:
    """What happens, once, to the connection whose client sends ``fragment``."""

    def __init__(
        self,
        fragment: str,
        *,
        is_carried_out: bool = False,
        is_silent: bool = False,
        is_half_answered: bool = False,
    ) -> None:
        self.fragment = fragment.encode()
        self.is_carried_out, self.is_silent = is_carried_out, is_silent
        self.is_half_answered = is_half_answered
        self.has_happened = threading.Event()


class Proxy:
    """Forwards connections to ``server``: a folder with a socket, or a host, and a port."""

    def __init__(self, server: tuple[str, int], address: str = "") -> None:
        """With an ``address`` it is reached by TCP, at a port of the system's choice."""
        self._server = server
        self._folder = tempfile.TemporaryDirectory(prefix="proxy-")
        self.host, self.port = address or self._folder.name, PORT
        self._listener = self._listen()
        self._is_away = False
        # Seconds by which what is sent is late, drawn for each piece of it.
        self.lateness: Callable[[], float] = float
        self._is_flowing = threading.Event()
        self._is_flowing.set()
        self._faults: list[Fault] = []
        self.sent_count = 0  # pieces that clients have sent; each waits for an answer
        self._links: set[_Link] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._is_flowing.set()
        self.cut()
        self._folder.cleanup()

    def lose(self, fragment: str) -> threading.Event:
        """Break the next connection that sends ``fragment``, before the server has seen it.

        Returns an event that is set when it has happened.
        """
        return self._add(Fault(fragment, is_carried_out=False))

    def lose_reply_to(self, fragment: str) -> threading.Event:
        """Break the next connection that sends ``fragment``, after the server has answered.

        Returns an event that is set when it has happened.
        """
        return self._add(Fault(fragment, is_carried_out=True))

    def lose_half_of_reply_to(self, fragment: str) -> threading.Event:
        """Break the next connection that sends ``fragment`` when one transaction was answered.

        Returns an event that is set when it has happened.
        """
        return self._add(Fault(fragment, is_half_answered=True))

    def swallow(self, fragment: str) -> threading.Event:
        """Let the next connection that sends ``fragment`` fall silent, before the server knows.

        Returns an event that is set when it has happened.
        """
        return self._add(Fault(fragment, is_silent=True))

    def cut(self) -> None:
        """Break every connection."""
        for link in list(self._links):
            link.cut()

    def reset(self) -> None:
        """Break every connection with a reset, as a router that has forgotten it (TCP only)."""
        for link in list(self._links):
            link.reset()

    @contextlib.contextmanager
    def partitioned(self) -> Iterator[None]:
        """Let nothing through while the block runs; afterwards all of it arrives, late."""
        self._is_flowing.clear()
        try:
            yield
        finally:
            self._is_flowing.set()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Break every connection, and let no new one come about while the block runs."""
        self._is_away = True
        self.cut()
        try:
            yield
        finally:
            self._is_away = False

    def freeze(self) -> None:
        """Let every connection that there is fall silent without an end: half-open."""
        for link in list(self._links):
            link.is_frozen = True

    def abandon(self) -> None:
        """Let the server find out about connections that fell silent, as by its keepalives."""
        for link in list(self._links):
            if link.is_frozen:
                link.abandon()

    def fault_in(self, sent: bytes) -> Fault | None:
        """Return the fault that ``sent`` brings about, if any; it will not happen again."""
        for fault in self._faults:
            if fault.fragment in sent:
                self._faults.remove(fault)
                return fault
        return None

    def _add(self, fault: Fault) -> threading.Event:
        self._faults.append(fault)
        return fault.has_happened

    def wait_for_flow(self) -> None:
        self._is_flowing.wait()

    def _listen(self) -> socket.socket:
        if self.host == self._folder.name:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(Path(self.host) / f".s.PGSQL.{PORT}"))
            listener.listen()
            return listener
        listener = socket.create_server((self.host, 0))
        self.port = listener.getsockname()[1]
        return listener

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                self.wait_for_flow()
                server = None if self._is_away else _connect(self._server)
                if server is None:
                    client.close()
                    continue
                link = _Link(self, client, server)
                self._links.add(link)
                threading.Thread(target=link.run, name="proxy-link", daemon=True).start()

    def forget(self, link: "_Link") -> None:
        self._links.discard(link)


class _Link:
    """One client's connection and its counterpart at the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._is_cut = threading.Event()
        self.is_frozen = False

    def run(self) -> None:
        with self._client, self._server, contextlib.suppress(OSError):
            while self._forward():
                pass
        self._proxy.forget(self)

    def cut(self) -> None:
        self._is_cut.set()
        for side in (self._client, self._server):
            with contextlib.suppress(OSError):  # that side is closed already
                side.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._server.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            linger = struct.pack("ii", 1, 0)
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._server.shutdown(socket.SHUT_RDWR)  # wakes run(), which closes both

    def _forward(self) -> bool:
        """Pass on what has come; False when the connection has ended."""
        for side in select.select([self._client, self._server], [], [])[0]:
            is_sent = side is self._client
            if self.is_frozen:
                self._is_cut.wait()
            self._proxy.wait_for_flow()
            data = side.recv(CHUNK_BYTES)
            if late := self._proxy.lateness():
                time.sleep(late)
            if not data:
                return False
            if is_sent and (fault := self._proxy.fault_in(data)):
                self._break(fault, data)
                return fault.is_silent
            self._proxy.sent_count += is_sent
            (self._server if is_sent else self._client).sendall(data)
        return True

    def _break(self, fault: Fault, sent: bytes) -> None:
        self.is_frozen = fault.is_silent
        if fault.is_carried_out:
            # The server answers when it has all of it; a long statement comes in pieces.
            while sent:
                self._server.sendall(sent)
                if self._server in select.select([self._client, self._server], [], [])[0]:
                    break
                sent = self._client.recv(CHUNK_BYTES)
        if fault.is_half_answered:
            self._server.sendall(sent)
            reply = b""
            while READY not in reply:
                reply += self._server.recv(CHUNK_BYTES)
            self._client.sendall(reply[: reply.index(READY) + len(READY)])
        self._see_it_off()
        fault.has_happened.set()

    def _see_it_off(self) -> None:
        """Wait until the server has noticed, and rolled back: till then its rows stay locked."""
        if self.is_frozen:
            return
        self._server.settimeout(GONE_WITHIN)
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_WR)
            while self._server.recv(CHUNK_BYTES):
                pass


def _connect(server: tuple[str, int]) -> socket.socket | None:
    """Return a connection to the server, or None while it is down."""
    host, port = server
    with contextlib.suppress(OSError):
        if not host.startswith("/"):
            return socket.create_connection(server)
        with contextlib.ExitStack() as unless_connected:
            connected = unless_connected.enter_context(socket.socket(socket.AF_UNIX))
            connected.connect(f"{host}/.s.PGSQL.{port}")
            unless_connected.pop_all()
            return connected
    return None


@contextlib.contextmanager
def through_a_proxy(alias: str = "default") -> Iterator[Proxy]:
    """Let this thread reach the database ``alias`` through a proxy."""
    direct = connections[alias]
    direct.ensure_connection()
    info = direct.connection.info
    with Proxy((info.host, info.port)) as proxy:
        place = {"HOST": proxy.host, "PORT": str(proxy.port)}
        connections[alias] = DatabaseWrapper(direct.settings_dict | place, alias)
        try:
            yield proxy
        finally:
            connections[alias].close()
            connections[alias] = direct
