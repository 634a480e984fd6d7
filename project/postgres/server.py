"""A PostgreSQL server in a folder: started or joined, left or stopped.

What its locks mean, and how it is stopped after its last user, is in watcher.py.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

from project.postgres import watcher
from project.postgres.account import Account, environment
from project.postgres.cluster import DATABASE, PORT, USER, create_cluster, server_options
from project.postgres.exceptions import ServerFailed
from project.postgres.installation import Installation

SOCKET = f".s.PGSQL.{PORT}"
START_SECONDS = 60
LONGEST_SOCKET_BYTES = 100  # the system's limit is 103 on macOS and 107 on Linux
LOCKS = ("start.lock", "users.lock", "server.lock", "watcher.lock")

StopMode = Literal["smart", "fast", "immediate"]


@dataclass
class Server:
    """A PostgreSQL server, its data and its locks in one folder.

    Every process that called ``start()`` uses the server until it ends or calls ``leave()``; after
    the last one it is stopped. A server that is not ``durable`` is faster, and may lose its data if
    the machine crashes. As a context manager it is started, and stopped whoever else uses it.
    """

    folder: Path
    installation: Installation
    account: Account
    durable: bool = True
    _users_lock: int | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server or join the running one; cheap if this process uses it already.

        Raises ServerFailed with PostgreSQL's own words if it does not come up.
        """
        if self._has_share and self.is_ready:
            return
        try:
            self._prepare_folder()
            with watcher.exclusive(self.folder / "start.lock"):
                self._share()
                if not self.data.exists():
                    create_cluster(self.data, self.bindir, self.account, durable=self.durable)
                self._run()
        except BaseException as error:
            self.leave()
            if isinstance(error, OSError):
                who = Account.current().name
                raise ServerFailed(f"{who} cannot use {self.folder}: {error}") from error
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server under all its users, and leave it; ``immediate`` is as good as a crash.

        Raises ServerFailed if it goes on, as in mode ``smart`` it does while it has clients.
        """
        with watcher.exclusive(self.folder / "start.lock"):
            self._stop(mode)
        self.leave()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server under all its users, and start it again with the same socket."""
        with watcher.exclusive(self.folder / "start.lock"):
            self._stop(mode)
        self.start()

    def leave(self) -> None:
        """Use the server no longer; if nobody else does, it stops soon."""
        if self._users_lock is not None:
            os.close(self._users_lock)
            self._users_lock = None

    @property
    def data(self) -> Path:
        """Return PostgreSQL's data directory."""
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """Return the file the server writes to."""
        return self.folder / "server.log"

    @property
    def bindir(self) -> Path:
        """Return where the programs are; ``installation.program(name)`` tells which exist."""
        return self.installation.bindir

    @property
    def pid(self) -> int | None:
        """Return the process id of the server, or None unless it is alive."""
        with suppress(OSError, ValueError, IndexError):
            pid = int(self._read_pid_file()[0])
            os.kill(pid, 0)
            # There is such a process; but a dead one that nobody has waited for holds no lock.
            return pid if watcher.is_locked(self.folder / "server.lock") else None
        return None

    @property
    def is_ready(self) -> bool:
        """Tell whether the server is alive and takes connections."""
        status = [line.strip() for line in self._read_pid_file()[7:8]]
        return status == ["ready"] and self.pid is not None

    @property
    def socket_dir(self) -> Path:
        """Return the folder of the socket: the same after a restart, and short."""
        if recorded := self._read_pid_file()[4:5]:
            return Path(recorded[0])
        digest = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:12]
        for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - owner is checked
            folder = parent / f"kanthorq-{self.account.uid}-{digest}"
            size_bytes = len(os.fsencode(folder / SOCKET))
            if size_bytes <= LONGEST_SOCKET_BYTES and self.account.can_enter(parent):
                return folder
        who = self.account.name
        raise ServerFailed(f"No temporary folder is short enough for a socket and open to {who}.")

    @property
    def dsn(self) -> str:
        """Return the URL of the database, for DATABASE_URL, psycopg and PostgreSQL's programs."""
        host = quote(str(self.socket_dir), safe="")
        return f"postgresql://{USER}@/{DATABASE}?host={host}&port={PORT}"

    def _prepare_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.account.own(self.folder)
        if not self.account.can_enter(self.folder):
            who = self.account.name
            raise ServerFailed(f"{self.folder}, or a folder above it, is closed to {who}.")
        for name in LOCKS:
            self._create_lock(self.folder / name)

    def _create_lock(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            self.account.own(descriptor)
        finally:
            os.close(descriptor)

    def _share(self) -> None:
        if not self._has_share:
            self.leave()
            self._users_lock = watcher.open_lock(self.folder / "users.lock")
            fcntl.flock(self._users_lock, fcntl.LOCK_SH)

    @property
    def _has_share(self) -> bool:
        held = self._users_lock
        return held is not None and watcher.is_lock_of(held, self.folder / "users.lock")

    def _run(self) -> None:
        """Return when the server is ready and watched. The caller holds start.lock and a share."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            server_lock = watcher.open_lock(self.folder / "server.lock")
            try:
                if watcher.try_lock(server_lock):
                    return self._launch(server_lock)
            finally:
                os.close(server_lock)
            if self.is_ready:
                return self._ensure_watched()
            time.sleep(watcher.POLL_SECONDS)  # a start, stop or crash is still under way
        raise ServerFailed(
            f"The server in {self.folder} neither starts nor ends.\n{self._last_words}"
        )

    def _launch(self, server_lock: int) -> None:
        # server.lock was free: no process of this server lives, and these files are leftovers. If
        # the number in them is in use again, PostgreSQL would take its new owner for a server.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        socket_dir = self._prepare_socket_dir()
        (socket_dir / f"{SOCKET}.lock").unlink(missing_ok=True)
        options = server_options(socket_dir, durable=self.durable)
        wait = ["-t", str(START_SECONDS)]
        start = self._pg_ctl("start", *wait, "-l", str(self.log), "-o", options)
        self._send_watcher(start, server_lock)

    def _prepare_socket_dir(self) -> Path:
        folder = self.socket_dir
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_private = found.st_mode == stat.S_IFDIR | stat.S_IRWXU
        if not is_private or found.st_uid not in (os.geteuid(), self.account.uid):
            who = self.account.name
            raise ServerFailed(f"{folder} is not a folder of {who} that is closed to others.")
        self.account.own(folder)
        return folder

    def _ensure_watched(self) -> None:
        watcher_lock = watcher.open_lock(self.folder / "watcher.lock")
        try:
            is_unwatched = watcher.try_lock(watcher_lock)
        finally:
            os.close(watcher_lock)
        if is_unwatched:
            self._send_watcher([], -1)

    def _send_watcher(self, start: list[str], server_lock: int) -> None:
        """Have a process that outlives this one start the server; return when it is ready."""
        stop = self._pg_ctl("stop", "-t", "5")
        options = self.account.process_options
        orders = watcher.Orders(str(self.folder), start, stop, server_lock, options)
        program = [sys.executable, "-I", "-S", watcher.__file__]
        with tempfile.TemporaryFile("w+") as output:
            with subprocess.Popen(
                [*program, json.dumps(dataclasses.asdict(orders))],
                cwd="/",
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[server_lock] if start else [],
                start_new_session=True,
            ) as process:
                status = process.wait()
            if status:
                output.seek(0)
                raise ServerFailed(f"No server started.\n{output.read()}\n{self._last_words}")

    def _stop(self, mode: StopMode) -> None:
        if self.pid is None:
            return
        status, said = self.account.run(*self._pg_ctl("stop", "-m", mode))
        if status:
            raise ServerFailed(f"The server in {self.folder} did not stop.\n{said}")

    def _pg_ctl(self, verb: str, *options: str) -> list[str]:
        return [str(self.bindir / "pg_ctl"), verb, "-w", "-D", str(self.data), *options]

    def _read_pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    @property
    def _last_words(self) -> str:
        with suppress(OSError):
            return self.log.read_text(errors="replace")[-2000:]
        return ""
