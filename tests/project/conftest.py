"""Folders and processes for the tests of the embedded PostgreSQL: real servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db.utils import ConnectionHandler

from project.postgres import watcher
from project.postgres.base import DatabaseWrapper
from project.postgres.launcher import Server, project_server
from tests.concurrency import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]

START = """
import os, signal, subprocess, sys
# Tests may run under nohup or in the background of a shell, which ignore these.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from project.postgres.launcher import project_server
server = project_server(Path(sys.argv[1]), durable=False)
server.start()
print(server.pid, flush=True)
"""
# Looks again and again: a signal that comes just before a read blocks is noticed after it alone.
STAY = """
import select
while not select.select([sys.stdin], [], [], 0.05)[0]:
    pass
sys.stdin.read()
"""


def python_path(first: Path) -> str:
    """Return a PYTHONPATH that starts with a folder."""
    return os.pathsep.join([str(first), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def server_of(project: Path) -> Server:
    """Return the server that the holders of a project use, to look at it without using it."""
    return project_server(project, durable=False)


def wrapper_for(project: Path) -> DatabaseWrapper:
    """Return a connection of Django's to the server of a project, not open yet."""
    given: dict[str, Any] = {"ENGINE": "project.postgres", "NAME": "kanthorq"}
    given |= {"EMBEDDED_PROJECT": project, "EMBEDDED_DURABLE": False}
    return DatabaseWrapper(ConnectionHandler({"default": given}).settings["default"])


def query(server: Server, statement: str) -> Any:
    """Return the first value of the first row, or None if the statement has no rows."""
    with psycopg.connect(server.dsn) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
    return row and row[0]


def is_stopped(server: Server) -> bool:
    """Tell whether nothing is left of a server, nor of a start or stop that is under way."""
    locks = ("server.lock", "watcher.lock", "start.lock")
    return not any(watcher.is_locked(server.folder / name) for name in locks)


class Holder(subprocess.Popen[str]):
    """A process that starts or joins a project's server and uses it until it ends."""

    def answer(self) -> str:
        """Wait for the next line the process prints; the first is the server's process id."""
        assert self.stdout is not None
        return self.stdout.readline().strip()


@pytest.fixture(scope="session")
def playground() -> Iterator[Path]:
    """Return a folder, with a space in its name, that every account reaches."""
    folder = Path(tempfile.mkdtemp(prefix="play ground "))
    folder.chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def quiet(playground: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep sockets in the playground, and fail a test that leaves a server behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(playground / "tmp"))
    yield
    for lock in playground.rglob("server.lock"):
        wait_until(lambda lock=lock: not watcher.is_locked(lock))  # type: ignore[misc]


@pytest.fixture
def project(playground: Path) -> Path:
    """Return the folder of a project whose data earlier tests may have made."""
    folder = playground / "my project"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def new_project(playground: Path) -> Path:
    """Return an empty folder for a project that no other test sees."""
    folder = Path(tempfile.mkdtemp(prefix="new project ", dir=playground))
    folder.chmod(0o755)
    return folder


@pytest.fixture
def environment(playground: Path) -> dict[str, str]:
    """Return the environment for processes that use a server."""
    own = {k: v for k, v in os.environ.items() if k not in {"DATABASE_URL", "EMBEDDED_DURABLE"}}
    return own | {"PYTHONPATH": python_path(REPOSITORY), "TMPDIR": str(playground / "tmp")}


@pytest.fixture
def hold(environment: dict[str, str]) -> Iterator[Callable[..., Holder]]:
    """Start processes that use a project's server; what the test leaves alive is killed."""
    holders: list[Holder] = []

    def start(
        project: Path, stay: str = STAY, python: str = sys.executable, **given: Any
    ) -> Holder:
        command = [python, "-W", "error", "-c", START + stay, str(project)]
        options: dict[str, Any] = {
            "env": environment,
            "text": True,
            "start_new_session": True,
        } | given
        pipe = subprocess.PIPE
        holders.append(Holder(command, stdin=pipe, stdout=pipe, stderr=pipe, **options))
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()
