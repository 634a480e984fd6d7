"""pg_upgrade keeps rows and the count of transactions, but gives the cluster a new identifier."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.core.management import call_command

from kanthorq_django.exceptions import ForeignCluster
from kanthorq_django.models.maintenance.rebase import rebase
from project.postgres.account import environment
from project.postgres.cluster import DATABASE, LOCALES, USER
from project.postgres.installation import Installation, find_installations
from project.postgres.launcher import Server, scratch_server
from tests.clusters.throwaway import Cluster
from tests.clusters.world import World, world_in_full_swing

pytestmark = pytest.mark.slow


@pytest.fixture
def newest() -> Installation:
    return next(find_installations())


@pytest.fixture
def old_cluster(newest: Installation) -> Iterator[Cluster]:
    """A cluster of an older major version than the newest one here."""
    older = [found for found in find_installations() if found.major < newest.major]
    if not older or newest.program("pg_upgrade") is None:
        pytest.skip("an upgrade needs pg_upgrade and two major versions of PostgreSQL")
    with scratch_server(bindir=older[0].bindir) as server:
        yield Cluster(server)


@contextmanager
def upgraded(old: Server, newest: Installation) -> Iterator[Cluster]:
    """Stop a server and yield a cluster of the new version with its data."""
    old.stop()
    with scratch_server(bindir=newest.bindir) as new:
        new.stop()
        run(new, "rm", "-r", new.data)
        options = ["--auth=trust", f"--username={USER}", f"--locale={LOCALES[0]}", "--no-sync"]
        options += ["--encoding=UTF8", "--no-data-checksums"] if newest.major >= 18 else []
        run(new, new.bindir / "initdb", "-D", new.data, *options)
        folders: list[str | Path] = [
            "-b",
            old.bindir,
            "-B",
            new.bindir,
            "-d",
            old.data,
            "-D",
            new.data,
        ]
        run(new, new.bindir / "pg_upgrade", *folders, "-U", USER, "-s", new.folder, "--no-sync")
        new.start()
        yield Cluster(new)


def run(server: Server, *command: str | Path) -> None:
    result = subprocess.run(
        command,
        cwd=server.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        **server.account.process_options,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_after_an_upgrade_and_a_rebase_every_event_has_exactly_one_task(
    old_cluster: Cluster, newest: Installation
):
    with old_cluster.alias(DATABASE) as name:
        call_command("migrate", "kanthorq_django", database=name, verbosity=0)
        old = world_in_full_swing(name)
    with upgraded(old_cluster.server, newest) as cluster, cluster.alias(DATABASE) as name:
        new = World(name, old.owed)
        with pytest.raises(ForeignCluster):
            new.consumer("all").pull()
        new.owe(new.publish_many_kinds())

        rebase(name)

        new.check()
        new.handle_all()
        new.check()
