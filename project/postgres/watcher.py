"""A small process that starts a server, waits until nobody uses it any more, and stops it.

Four locks in a server's folder hold all there is to know. The kernel frees the locks of a dead
process, however it died. So none of these facts can be stale, and a server is stopped without any
process having to handle a signal:

``start.lock``    held by whoever is starting or stopping the server right now;
``users.lock``    shared by every process that uses the server; a forked child has its parent's;
``server.lock``   held by PostgreSQL, all its processes: whatever ``pg_ctl`` starts inherits it;
``watcher.lock``  held by the watcher; a server has one.

Locks are taken in the order start, users. As a program this file needs only the standard library.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAST_SECONDS = 30  # then the server is stopped without waiting for its clients
GIVE_UP_SECONDS = 60
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Orders:
    """What the launcher asks for; handed over as JSON."""

    folder: str
    start: list[str]  # empty if the server runs already
    stop: list[str]
    server_lock: int  # an open file that holds server.lock; -1 if the server runs already
    process_options: dict[str, Any]


def open_lock(path: Path) -> int:
    """Return a new descriptor of a lock file. Raises OSError if there is none we may open."""
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if that is possible at once, and tell whether it was."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Tell whether anybody holds a lock file exclusively."""
    descriptor = open_lock(path)
    try:
        return not try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def is_lock_of(descriptor: int, path: Path) -> bool:
    """Tell whether an open lock is the one at ``path``, not one of a folder deleted since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file for the length of a block; threads exclude each other too."""
    descriptor = open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Not just closed: a child that another thread forked meanwhile has the file open too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def main(orders: Orders) -> int:
    """Start the server if asked to, then watch it unless it is watched. Return the exit status."""
    watcher_lock = open_lock(Path(orders.folder, "watcher.lock"))
    is_watcher = try_lock(watcher_lock)
    status = _start(orders) if orders.start else 0
    if is_watcher:  # after a failed start too: what is too late to be waited for may come up yet
        _detach(status)
        _stop_after_last_user(orders, watcher_lock)
    return status


def _start(orders: Orders) -> int:
    lock = orders.server_lock
    status = subprocess.run(
        orders.start, check=False, pass_fds=[lock], **orders.process_options
    ).returncode
    os.close(lock)
    return status


def _detach(status: int) -> None:
    """Return in a child that belongs to nobody; here the caller's wait for this program ends."""
    # It ends by itself, and must not end before those it watches do: not even in its first moment.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(status)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)


def _stop_after_last_user(orders: Orders, watcher_lock: int) -> None:
    folder = Path(orders.folder)
    users = open_lock(folder / "users.lock")
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)  # waits here for as long as anybody uses the server
        fcntl.flock(users, fcntl.LOCK_UN)
        with exclusive(folder / "start.lock"):
            if not is_lock_of(users, folder / "users.lock"):
                return  # the server here now is another one, with a watcher of its own
            if try_lock(users):  # else somebody came while we waited for start.lock
                _stop(orders)
                os.close(watcher_lock)  # before start.lock, so that the next starter gets a watcher
                return


def _stop(orders: Orders) -> None:
    began = time.monotonic()
    while is_locked(Path(orders.folder, "server.lock")):
        elapsed = time.monotonic() - began
        if elapsed > GIVE_UP_SECONDS:
            return
        mode = "fast" if elapsed < FAST_SECONDS else "immediate"
        # Again and again: a start that lost its caller may not be ready to be stopped yet.
        subprocess.run([*orders.stop, "-m", mode], check=False, **orders.process_options)
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    # Where its folder was deleted, a server stops by itself.
    with suppress(FileNotFoundError):
        sys.exit(main(Orders(**json.loads(sys.argv[1]))))
