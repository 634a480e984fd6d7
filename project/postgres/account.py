"""Whom a server runs as: ourselves or, since PostgreSQL refuses root, an account root borrows."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

BORROWED = ("postgres", "nobody")  # existing accounts only: none is ever created


class Answer(NamedTuple):
    """How a program ended."""

    status: int
    said: str  # on standard output and standard error


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the operating system, by number."""

    uid: int
    gid: int

    @classmethod
    def current(cls) -> Account:
        """Return the account of this process."""
        return cls(os.geteuid(), os.getegid())

    @property
    def name(self) -> str:
        """Return the user name, or the number of a user that has none."""
        with suppress(KeyError):
            return pwd.getpwuid(self.uid).pw_name
        return str(self.uid)

    @property
    def process_options(self) -> dict[str, Any]:
        """Return what ``subprocess`` needs to run a program as this account."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(self, *command: str | Path, stdin: IO[str] | None = None) -> Answer:
        """Run a program as this account. Raises OSError if it cannot be executed."""
        # Not into a pipe: a server that inherits it keeps it open, and its reader waiting.
        with tempfile.TemporaryFile("w+") as output:
            result = subprocess.run(
                command,
                check=False,
                cwd="/",
                env=environment(),
                stdin=stdin or subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                **self.process_options,
            )
            output.seek(0)
            return Answer(result.returncode, output.read().strip())

    def can_run(self, *command: str | Path) -> bool:
        """Tell whether a program can be executed and succeeds as this account."""
        try:
            return self.run(*command).status == 0
        except (OSError, subprocess.SubprocessError):
            return False

    def can_enter(self, folder: Path) -> bool:
        """Tell whether this account reaches a folder, through every folder above it."""
        return self.can_run("/bin/sh", "-c", 'cd -- "$1"', "sh", folder)

    def own(self, target: Path | int) -> None:
        """Give a path or an open file to this account, which only root can. Raises OSError."""
        if self.uid != os.geteuid():
            os.chown(target, self.uid, self.gid, follow_symlinks=isinstance(target, int))


def available_accounts() -> Iterator[Account]:
    """Yield whom this process can run a server as, best first."""
    if os.geteuid() != 0:
        yield Account.current()
        return
    for name in BORROWED:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            yield Account(entry.pw_uid, entry.pw_gid)


def environment() -> dict[str, str]:
    """Return the environment for PostgreSQL's programs."""
    # PGPORT, PGDATA and their like are about other servers of the user; C makes messages English.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return own | {"LC_ALL": "C"}
