"""The data of a server: how it is made, and with which settings it runs."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path

from project.postgres.account import Account, Answer
from project.postgres.exceptions import ServerFailed

USER = DATABASE = "kanthorq"
PORT = 5432  # a part of the socket's name; no TCP port is ever opened
LOCALES = ("C.UTF-8", "C")  # not every system has the first

SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "max_prepared_transactions": "20",
}
# A server that crashes loses nothing even so, only a machine does: synchronous_commit stays on.
VOLATILE_SETTINGS = {"fsync": "off", "full_page_writes": "off"}


def create_cluster(data: Path, bindir: Path, account: Account, *, durable: bool) -> None:
    """Make a data directory with an empty database in it. Raises ServerFailed.

    It appears under its name when it is complete, so a start that is killed leaves no half of one.
    """
    for leftover in data.parent.glob("new-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    answer = Answer(1, "")
    for locale in LOCALES:
        new = Path(tempfile.mkdtemp(prefix="new-", dir=data.parent))
        account.own(new)
        options = ["--encoding=UTF8", "--auth=trust", f"--username={USER}", f"--locale={locale}"]
        options += [] if durable else ["--no-sync"]
        answer = account.run(bindir / "initdb", "-D", new, *options)
        if answer.status == 0:
            _create_database(new, bindir, account)
            new.rename(data)
            return
    raise ServerFailed(f"initdb failed.\n{answer.said}")


def server_options(socket_dir: Path, *, durable: bool) -> str:
    """Return the settings as options of ``postgres``, quoted for the shell that ``pg_ctl`` uses."""
    settings = SETTINGS | {"unix_socket_directories": f'"{socket_dir}"'}
    settings |= {} if durable else VOLATILE_SETTINGS
    return " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())


def _create_database(data: Path, bindir: Path, account: Account) -> None:
    with tempfile.TemporaryFile("w+") as statement:
        statement.write(f"CREATE DATABASE {DATABASE};\n")
        statement.seek(0)
        postgres = bindir / "postgres"
        answer = account.run(postgres, "--single", "-D", data, "postgres", stdin=statement)
    if answer.status:
        raise ServerFailed(f"CREATE DATABASE failed.\n{answer.said}")
