"""A disk that is soon full: a small file system in memory."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from project.postgres.account import Account

CHUNK_BYTES = 64 * 1024


class Disk:
    """A mounted file system that can be filled up and freed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Take all the space there is but ``leave_bytes``."""
        found = os.statvfs(self.folder)
        free_bytes = found.f_bavail * found.f_frsize - leave_bytes
        with self._filler.open("wb") as filler:
            for _ in range(free_bytes // CHUNK_BYTES):
                filler.write(bytes(CHUNK_BYTES))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"


@contextmanager
def small_disk(folder: Path, account: Account, *, size_mib: int) -> Iterator[Disk]:
    """Mount it at ``folder``, for ``account``. Skips loudly without the right to."""
    folder.mkdir()
    options = f"size={size_mib}m,uid={account.uid},gid={account.gid},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here; that needs root")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
