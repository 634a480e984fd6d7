"""PgBouncer before a server, with very few connections to it."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from project.postgres.cluster import PORT, USER

PATIENT_SECONDS = 5.0  # for who ends in good order
POOL_PORT = 6432  # part of the socket's name only
CONFIGURATION = """
[databases]
* = host={server} port={port} user={user}
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
listen_port = {pool_port}
auth_type = any
auth_file =
admin_users = {user}
pool_mode = {mode}
default_pool_size = {size}
server_idle_timeout = 5
ignore_startup_parameters = extra_float_digits
logfile = {folder}/log
pidfile = {folder}/pid
"""


class Pooler:
    """A running PgBouncer; ``folder`` is where its socket is."""

    port = POOL_PORT

    def __init__(self, folder: Path, account: str | None) -> None:
        self.folder, self._account = folder, account
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["pgbouncer", "-q", str(self.folder / "configuration")],
            user=self._account,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not (self.folder / f".s.PGSQL.{POOL_PORT}").exists():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)

    def stop(self, *, is_patient: bool) -> None:
        """End it in good order: when all transactions have ended, or at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT if is_patient else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENT_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would, if it runs."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        for left in (f".s.PGSQL.{POOL_PORT}", "pid"):
            (self.folder / left).unlink(missing_ok=True)

    def order(self, command: str) -> None:
        """Give an order at its console, such as PAUSE."""
        place = f"host={self.folder} port={POOL_PORT} dbname=pgbouncer user={USER}"
        with psycopg.connect(place, autocommit=True) as console:
            console.pgconn.exec_(command.encode())


@contextmanager
def pooler(
    server: Path, folder: Path, *, size: int = 2, mode: str = "transaction"
) -> Iterator[Pooler]:
    """Run PgBouncer. Skips loudly where there is none."""
    if shutil.which("pgbouncer") is None:
        pytest.skip("there is no PgBouncer; apt-get install pgbouncer")
    account = "postgres" if os.geteuid() == 0 else None  # it refuses root
    folder.mkdir()
    if account:
        os.chown(folder, pwd.getpwnam(account).pw_uid, -1)
    text = CONFIGURATION.format(
        server=server,
        port=PORT,
        folder=folder,
        pool_port=POOL_PORT,
        user=USER,
        size=size,
        mode=mode,
    )
    (folder / "configuration").write_text(text)
    running = Pooler(folder, account)
    running.start()
    try:
        yield running
    finally:
        running.kill()
