"""A disk that is soon full: a small file system in memory."""

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from project.postgres.account import Account
from project.postgres.launcher import Server

NEEDS = "a small file system cannot be mounted here; that needs root"


class Disk:
    """A mounted file system that can be filled up and freed."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self._size_bytes = size_bytes

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Take all the space there is but ``leave_bytes``."""
        deadline = time.monotonic() + 5
        while not _is_resized(self.folder, _used_bytes(self.folder) + leave_bytes):
            # Somebody has just written to it, and what is used cannot be taken away.
            assert time.monotonic() < deadline, f"{self.folder} cannot be made smaller"

    def free(self) -> None:
        assert _is_resized(self.folder, self._size_bytes), f"{self.folder} stays full"


@functools.cache
def is_possible() -> bool:
    """Tell whether this process may mount a file system."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        if not _is_mounted(Path(folder), "size=1m"):
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextmanager
def small_disk(folder: Path, account: Account, *, size_mib: int) -> Iterator[Disk]:
    """Mount it at ``folder``, for ``account``. Skips loudly without the right to."""
    folder.mkdir()
    options = f"size={size_mib}m,uid={account.uid},gid={account.gid},mode=0700"
    if os.geteuid() != 0 or not _is_mounted(folder, options):
        pytest.skip(NEEDS)
    try:
        yield Disk(folder, size_mib * 2**20)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def move_log(server: Server, disk: Disk) -> None:
    """Let a server that is stopped write its log ahead to ``disk``."""
    moved = disk.folder / "pg_wal"
    shutil.copytree(server.data / "pg_wal", moved)
    for path in [moved, *moved.rglob("*")]:
        server.account.own(path)
    shutil.rmtree(server.data / "pg_wal")
    (server.data / "pg_wal").symlink_to(moved)


def _is_mounted(folder: Path, options: str) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return not subprocess.run(mount, capture_output=True, check=False).returncode


def _used_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _is_resized(folder: Path, size_bytes: int) -> bool:
    options = f"remount,size={max(size_bytes, 4096)}"  # 0 would mean any size
    resize = ["mount", "-o", options, str(folder)]
    return not subprocess.run(resize, capture_output=True, check=False).returncode
