"""What a soak has left on the machine: processes, mounts, networks, files."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NOTICED_WITHIN = 5.0  # seconds in which what was ended is gone
MARK = "FAULTS_SOAK"  # in the environment of every process of a soak: the folder of it


def found(folder: Path, network: str) -> list[str]:
    """Return what is left, after a moment in which it may still go."""
    deadline = time.monotonic() + NOTICED_WITHIN
    while (left := list(_found(folder, network))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def sweep(folder: Path, network: str) -> None:
    """Take away whatever is left."""
    for pid in _processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for mount in _mounts(folder):
        subprocess.run(["umount", "-l", mount], check=False)
    if network in _networks():
        subprocess.run(["ip", "netns", "del", network], check=False)


def _found(folder: Path, network: str) -> Iterator[str]:
    for pid in _processes(folder):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            yield f"process {pid}: {b' '.join(words[:4]).decode(errors='replace')}"
    yield from (f"mount {mount}" for mount in _mounts(folder))
    if network in _networks():
        yield f"network {network}"
    yield from (f"file {path}" for path in (folder / "tmp").glob("*"))


def _processes(folder: Path) -> Iterator[int]:
    """Yield who has our mark, or works in our folder: the server's hide their environment."""
    mark = f"{MARK}={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            has_mark = mark in (process / "environ").read_bytes().split(b"\0")
            if has_mark or (process / "cwd").readlink().is_relative_to(folder):
                yield int(process.name)


def _mounts(folder: Path) -> list[str]:
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [where for where in mounted if where.startswith(f"{folder}/")]


def _networks() -> list[str]:
    names = Path("/run/netns")
    return [path.name for path in names.iterdir()] if names.is_dir() else []
