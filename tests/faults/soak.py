"""Every fault that this machine can do, at random and on top of each other, for as long as asked.

    make soak MINUTES=30 SEED=7

Workers are killed, frozen and replaced, the server crashes, its disks fill up, roads to it are
cut; one worker is only ever hit by what hits its connections, and tells whether memory stays
flat. At the end all of it has to be handled exactly once, or the seed is printed with what was
not. Interrupted it takes away all that it has started.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

import psycopg

from project.postgres.cluster import PORT
from project.postgres.exceptions import ServerFailed
from project.postgres.launcher import Server, scratch_server
from tests.faults import cable, remains, small_disk
from tests.faults.ground import Ground
from tests.faults.mischief import FAULTS, missing
from tests.faults.pooler import pooler
from tests.faults.stage import PATIENCE, Stage
from tests.faults.turmoil import Disks, Turmoil
from tests.faults.verdict import Verdict
from tests.proxy import Proxy

NAME = "soak"  # of the database
POOL_SIZE = 10
TABLES_MIB, LOG_MIB = 4096, 1024  # at most; they take what is used
SETTINGS = {"max_wal_size": "128MB", "deadlock_timeout": "200ms", "wal_keep_size": "0"}
TOLD_MAX = 40  # violations in words
INTERRUPTED = 130  # as a shell calls it


def main() -> int:
    """Run a soak from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    sys.stdout.write(f"SEED={given.seed} MINUTES={given.minutes:g}\n")
    for what in missing():
        sys.stdout.write(f"left out: {what}\n")
    sys.stdout.flush()
    try:
        verdict = soak(given.minutes * 60, given.seed)
    except KeyboardInterrupt:
        sys.stdout.write(f"interrupted; nothing is left behind; SEED={given.seed}\n")
        return INTERRUPTED
    for what in verdict.wrong[:TOLD_MAX]:
        sys.stdout.write(f"WRONG {what}\n")
    sys.stdout.write(f"{verdict.line(seed=given.seed, minutes=given.minutes)}\n")
    return 1 if verdict.wrong else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Unwind everything, once: who is impatient may not keep us from it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def soak(seconds: float, seed: int) -> Verdict:
    """Run a soak in a folder of its own, and look what it has left behind."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    network = f"kqs{os.getpid()}"
    try:
        with _workplace(folder):
            verdict = _judged(folder, network, seconds, seed)
        for what in remains.found(folder, network):
            verdict.add(f"left behind: {what}")
    finally:
        remains.sweep(folder, network)
        if sys.exc_info()[0] is KeyboardInterrupt:
            shutil.rmtree(folder, ignore_errors=True)
    if verdict.wrong:
        sys.stdout.write(f"what clients, workers and the server saw: {folder}\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[None]:
    """Let all temporary files be in ``folder``, and mark all processes with it."""
    folder.chmod(0o755)  # for the accounts of the server and the pooler
    (folder / "tmp").mkdir(mode=0o755)
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "tmp")
    os.environ[remains.MARK] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        del os.environ[remains.MARK]


def _judged(folder: Path, network: str, seconds: float, seed: int) -> Verdict:
    """Return how a soak went; an exception is wrong, too."""
    verdict, began = Verdict(), time.monotonic()
    with ExitStack() as later:
        turmoil = _prepared(later, folder, network, seed)
        with _noted(verdict):
            turmoil.run(seconds)
        turmoil.over.set()
        with _noted(verdict):
            _conclude(turmoil, verdict)
        if verdict.wrong:
            shutil.copy(turmoil.stage.server.data.parent / "server.log", folder)
    for name, count in sorted(turmoil.counts.items()):
        sys.stdout.write(f"{count:6d} {name}\n")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s in all, patience {PATIENCE:.0f} s\n")
    return verdict


@contextlib.contextmanager
def _noted(verdict: Verdict) -> Iterator[None]:
    """Add an exception of the block to what is wrong, and go on."""
    try:
        yield
    except AssertionError as error:
        verdict.add(str(error))
    except (psycopg.Error, ServerFailed) as error:
        verdict.add("".join(traceback.format_exception(error)))


def _conclude(turmoil: Turmoil, verdict: Verdict) -> None:
    """Stop everybody, and compare what they saw with what is there."""
    try:
        turmoil.stage.stop()
    except AssertionError as error:
        verdict.add(f"stuck: {error}")
    if turmoil.pool is not None:
        turmoil.pool.kill()
    verdict.judge(turmoil.stage.facts())
    verdict.faults = sum(turmoil.counts[name] for name in FAULTS)
    verdict.growth_bytes = turmoil.steadiness.growth_bytes
    for what in turmoil.wrong + turmoil.steadiness.wrong():
        verdict.add(what)


def _prepared(later: ExitStack, folder: Path, network: str, seed: int) -> Turmoil:
    """Build all that a soak needs; ``later`` takes it down."""
    # Durable: a process that is killed inside a write may leave half a page, which only the full
    # pages in the log make good.
    ground = Ground(later.enter_context(scratch_server(durable=True)))
    ground.create(NAME)
    server = ground.server
    disks = _disks(later, folder, server) if small_disk.is_possible() else None
    with psycopg.connect(server.dsn, autocommit=True) as session:
        for name, value in SETTINGS.items():
            session.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        session.execute("SELECT pg_reload_conf()")
    place = (str(server.socket_dir), PORT)
    proxy, publishers = (later.enter_context(Proxy(place, "127.0.0.1")) for _ in range(2))
    stage = later.enter_context(Stage(server, NAME, folder, seed))
    stage.consumers += ["ticks", "slow"]
    turmoil = Turmoil(stage, proxy, publishers, random.Random(seed), disks=disks)  # noqa: S311  # repeatable on purpose
    if shutil.which("pgbouncer"):
        pool = pooler(server.socket_dir, folder / "pool", size=POOL_SIZE)
        turmoil.pool = later.enter_context(pool)
    if cable.is_possible():
        turmoil.cable = later.enter_context(cable.laid(network))
        turmoil.cable_end = later.enter_context(Proxy(place, turmoil.cable.address))
    return turmoil


def _disks(later: ExitStack, folder: Path, server: Server) -> Disks:
    """Move the tables and the log of a server to disks of their own."""
    server.stop()
    tables, log = (
        later.enter_context(small_disk.small_disk(folder / name, server.account, size_mib=size))
        for name, size in (("tables", TABLES_MIB), ("log", LOG_MIB))
    )
    later.callback(server.stop, "immediate")  # before its disks go
    small_disk.move_log(server, log)
    server.start()
    with psycopg.connect(server.dsn, autocommit=True) as session:
        session.execute(f"CREATE TABLESPACE small LOCATION '{tables.folder}'")
        session.execute(f"ALTER DATABASE {NAME} SET TABLESPACE small")
    return Disks(tables, log)


if __name__ == "__main__":
    sys.exit(main())
