"""Which server a process gets.

``project_server(folder)`` is the one of a project, shared by all its processes;
``scratch_server()`` is one more, for whoever wants to crash, dump or restore one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from project.postgres.account import Account, available_accounts
from project.postgres.exceptions import ServerFailed
from project.postgres.installation import Installation, find_installations, not_found
from project.postgres.server import Server

__all__ = ["Server", "project_server", "scratch_server"]


@functools.cache
def project_server(project: Path, *, durable: bool = True) -> Server:
    """Return the server of a project, which ``start()`` then starts or joins.

    Its data is in ``.postgres/<major>/`` of the project, or in a folder of /var/tmp if the account
    that runs the server cannot get there. What is not durable has data of its own, in
    ``<major>-volatile``.

    Raises PostgresNotFound if nothing can be started, ServerFailed if the data is somebody else's.
    """
    server = _first_runnable(_project_servers(project.resolve(), durable))
    _prepare_home(server.folder.parent)
    return server


@contextmanager
def scratch_server(*, durable: bool = False, bindir: Path | None = None) -> Iterator[Server]:
    """Yield a running server of one's own; nothing of it is left afterwards.

    Without ``bindir`` it is the PostgreSQL that the project would run. Raises PostgresNotFound if
    nothing can be started, ServerFailed if it does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="kanthorq-scratch-"))
    try:
        with _first_runnable(_scratch_servers(folder, durable, bindir)) as server:
            socket_dir = server.socket_dir
            yield server
        shutil.rmtree(socket_dir, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _first_runnable(servers: Iterable[Server]) -> Server:
    rejected = []
    for server in servers:
        if server.account.can_run(server.bindir / "postgres", "--version"):
            return server
        rejected.append(f"{server.bindir} is closed to {server.account.name}, who would run it")
    raise not_found(rejected)


def _project_servers(project: Path, durable: bool) -> Iterator[Server]:
    for installation in find_installations():
        name = str(installation.major) if durable else f"{installation.major}-volatile"
        for account, folder in _places(project, name):
            yield Server(folder, installation, account, durable)


def _scratch_servers(folder: Path, durable: bool, bindir: Path | None) -> Iterator[Server]:
    for installation in (
        find_installations() if bindir is None else filter(None, [Installation.at(bindir)])
    ):
        for account in available_accounts():
            yield Server(folder, installation, account, durable)


def _places(project: Path, name: str) -> Iterator[tuple[Account, Path]]:
    """Yield who may run a server and where, best first; data that exists leaves no choice."""
    near, far = project / ".postgres", _far_home(project)
    for folder in (near / name, far / name):
        if owner := _owner(folder):
            yield owner, folder
            return
    for account in available_accounts():
        home = near if _is_open(project, account) else far
        yield account, home / name


def _far_home(project: Path) -> Path:
    """Return the folder to use when the project's own is out of reach."""
    parent = Path("/var/tmp")  # noqa: S108 - unlike /tmp it survives a reboot; the owner is checked
    digest = hashlib.sha256(os.fsencode(project)).hexdigest()[:12]
    if not parent.is_dir():
        parent = Path(tempfile.gettempdir())
    home = parent / f"kanthorq-data-{os.geteuid()}-{digest}"
    if home.is_symlink() or (home.exists() and home.stat().st_uid != os.geteuid()):
        raise ServerFailed(f"{home} is not a folder of {Account.current().name}; delete it.")
    return home


def _owner(folder: Path) -> Account | None:
    """Return whose data is in ``folder``, if any. Raises ServerFailed if we cannot act as them."""
    try:
        found = folder.stat()
    except OSError:
        return None
    owner = Account(found.st_uid, found.st_gid)
    if owner.uid == 0:
        return None  # a start that was cut off before it gave the folder away
    if os.geteuid() not in (0, owner.uid):
        ways_out = "be that user or root, delete it, or set DATABASE_URL"
        raise ServerFailed(f"{folder} belongs to {owner.name}: {ways_out}.")
    return owner


def _is_open(project: Path, account: Account) -> bool:
    home = project / ".postgres"
    return account.can_enter(project) and os.access(home if home.exists() else project, os.W_OK)


def _prepare_home(home: Path) -> None:
    with suppress(FileExistsError):
        home.mkdir()
        # For the server's account, whatever the umask; the folders inside are closed.
        home.chmod(0o711)
        (home / ".gitignore").write_text("*\n")
