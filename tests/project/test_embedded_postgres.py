"""The embedded PostgreSQL is found, started, shared, and stopped after its last user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from django.db.utils import OperationalError

from project.postgres import watcher
from project.postgres.launcher import Server, project_server, scratch_server
from tests.concurrency import wait_until
from tests.processes import is_alive
from tests.project.conftest import (
    REPOSITORY,
    is_stopped,
    python_path,
    query,
    server_of,
    wrapper_for,
)

with_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")

KEEP = "DROP TABLE IF EXISTS kept; CREATE TABLE kept AS SELECT 42 AS answer"
FORK = """
if child := os.fork():
    print(child, flush=True)
sys.stdin.read()
"""
SPAWN = """
subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], close_fds=False)
print("spawned", flush=True)
sys.stdin.read()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def watchers_of(server: Server) -> list[int]:
    """Return the process ids of the server's watchers; its folder is among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"watcher.py" in words and json.dumps(str(server.folder)).encode() in words:
            found.append(int(path.parent.name))
    return found


@contextmanager
def leaving(server: Server) -> Iterator[Server]:
    """Leave a server after the block, in which something starts it."""
    try:
        yield server
    finally:
        server.leave()


# Started and shared


def test_a_project_has_a_server_even_with_a_space_in_its_path(project, hold):
    hold(project).answer()
    server = server_of(project)
    assert query(server, "SHOW data_directory") == str(
        project / ".postgres" / server.folder.name / "data"
    )
    assert query(server, "SHOW server_encoding") == "UTF8"


def test_a_server_has_the_settings_the_project_relies_on(project, hold):
    hold(project).answer()
    names = ("max_connections", "max_prepared_transactions", "listen_addresses", "fsync")
    found = [query(server_of(project), f"SHOW {name}") for name in names]
    assert found == ["200", "20", "", "off"]


def test_data_and_socket_are_closed_to_other_users(project, hold):
    hold(project).answer()
    server = server_of(project)
    assert mode(server.socket_dir) == mode(server.folder) == mode(server.data) == 0o700


def test_durable_data_is_synced_and_lies_apart_from_volatile_data(new_project):
    durable, volatile = project_server(new_project), project_server(new_project, durable=False)
    assert volatile.folder.name == f"{durable.folder.name}-volatile"
    with durable:
        assert query(durable, "SHOW fsync") == "on"


def test_two_processes_share_one_server(project, hold):
    assert hold(project).answer() == hold(project).answer() != ""


def test_processes_that_start_at_once_share_one_server(new_project, hold):
    holders = [hold(new_project) for _ in range(5)]
    pids = {holder.answer() for holder in holders}
    assert len(pids) == 1
    assert pids != {""}


def test_threads_that_connect_at_once_share_one_server(new_project):
    with leaving(server_of(new_project)) as server, ThreadPoolExecutor(4) as threads:
        starts = [threads.submit(server.start) for _ in range(4)]
        assert [start.result() for start in starts] == [None] * 4
        assert query(server, "SELECT 1") == 1


def test_two_projects_side_by_side_have_a_server_each(project, new_project, hold):
    assert hold(project).answer() != hold(new_project).answer()
    one, other = server_of(project), server_of(new_project)
    assert query(one, "SHOW data_directory") != query(other, "SHOW data_directory")


# Stopped after the last user


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_the_server_stops_after_a_signal_ended_its_last_user(project, hold, number):
    holder = hold(project)
    holder.answer()
    holder.send_signal(number)
    wait_until(lambda: is_stopped(server_of(project)))
    assert server_of(project).pid is None


def test_the_server_stops_after_its_last_user_ended_by_itself(project, hold):
    holder = hold(project, stay="")
    holder.answer()
    wait_until(lambda: is_stopped(server_of(project)))
    assert holder.wait() == 0


def test_the_server_stays_until_the_last_of_two_users_is_killed(project, hold):
    first, last = hold(project), hold(project)
    pid = first.answer()
    last.answer()
    first.kill()
    first.wait()
    assert query(server_of(project), "SELECT 1") == 1
    assert str(server_of(project).pid) == pid
    last.kill()
    wait_until(lambda: is_stopped(server_of(project)))


def test_the_server_stops_after_its_users_whole_process_group_is_killed(project, hold):
    holder = hold(project)
    holder.answer()
    os.killpg(holder.pid, signal.SIGKILL)
    wait_until(lambda: is_stopped(server_of(project)))


def test_a_forked_child_keeps_the_server_after_its_parent_is_killed(project, hold):
    holder = hold(project, stay=FORK)
    pid, child = holder.answer(), int(holder.answer())
    holder.kill()
    holder.wait()
    assert query(server_of(project), "SELECT 1") == 1
    assert str(server_of(project).pid) == pid
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: is_stopped(server_of(project)))


def test_another_program_run_by_a_user_does_not_keep_the_server(project, hold):
    holder = hold(project, stay=SPAWN)
    holder.answer()
    assert holder.answer() == "spawned"
    holder.kill()
    wait_until(lambda: is_stopped(server_of(project)))


def test_the_pipes_of_the_process_that_started_the_server_are_not_kept_open(project, hold):
    starter, other = hold(project, stay=""), None
    starter.answer()
    other = hold(project)
    other.answer()
    assert starter.communicate(timeout=20) == ("", "")
    assert server_of(project).is_ready


def test_a_start_that_is_killed_leaves_no_server(new_project, hold):
    holder = hold(new_project)
    wait_until(server_of(new_project).data.exists)
    holder.kill()
    wait_until(lambda: is_stopped(server_of(new_project)))
    assert server_of(new_project).pid is None


@with_proc
def test_a_killed_watcher_is_replaced_by_the_next_to_join(project, hold):
    holder = hold(project)
    holder.answer()
    server = server_of(project)
    (watcher_pid,) = watchers_of(server)
    os.kill(watcher_pid, signal.SIGKILL)
    wait_until(lambda: not watcher.is_locked(server.folder / "watcher.lock"))
    other = hold(project)
    assert other.answer() == str(server.pid)
    holder.kill()
    other.kill()
    wait_until(lambda: is_stopped(server))
    assert server.pid is None


@with_proc
def test_a_watcher_ends_by_itself_and_by_nothing_less_than_sigkill(project, hold):
    holder = hold(project)
    holder.answer()
    (watcher_pid,) = watchers_of(server_of(project))
    os.kill(watcher_pid, signal.SIGTERM)
    os.kill(watcher_pid, signal.SIGHUP)
    holder.kill()
    wait_until(lambda: is_stopped(server_of(project)))
    wait_until(lambda: not watchers_of(server_of(project)))


# Recovered


def test_a_killed_server_is_started_again_by_the_next_connection(project):
    with server_of(project) as server:
        query(server, KEEP)
        killed = server.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not server.is_ready)
        server.start()
        assert server.pid != killed
        assert query(server, "SELECT answer FROM kept") == 42


@with_proc
def test_a_server_recovers_after_it_was_killed_with_its_watcher_and_its_users(project, hold):
    holder = hold(project)
    holder.answer()
    server = server_of(project)
    query(server, KEEP)
    for pid in (*watchers_of(server), server.pid, holder.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_stopped(server))
    assert (server.data / "postmaster.pid").exists()
    hold(project).answer()
    assert query(server, "SELECT answer FROM kept") == 42


def test_a_stale_pid_file_does_not_mislead_even_if_its_number_is_in_use(project):
    server = server_of(project)
    with server:
        stale = (server.data / "postmaster.pid").read_text().splitlines()
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, **server.account.process_options
    ) as other:
        text = "\n".join([str(other.pid), *stale[1:]]) + "\n"
        (server.data / "postmaster.pid").write_text(text)
        assert server.pid is None
        with server:
            assert query(server, "SELECT 1") == 1


def test_a_user_of_a_deleted_server_becomes_a_user_of_its_successor(new_project, hold):
    with leaving(server_of(new_project)) as server:
        server.start()
        deleted = server.pid
        assert deleted is not None
        shutil.rmtree(server.folder)
        other = hold(new_project)
        other.answer()
        server.start()
        other.kill()
        other.wait()
        with os.fdopen(watcher.open_lock(server.folder / "users.lock")) as users:
            assert not watcher.try_lock(users.fileno())
        assert query(server, "SELECT 1") == 1
    with suppress(ProcessLookupError):  # without its data it ends by itself, within a minute
        os.kill(deleted, signal.SIGQUIT)


def test_a_start_cut_off_in_initdb_is_done_again(new_project):
    leftover = server_of(new_project).folder / "new-cut-off"
    leftover.mkdir(parents=True)
    (leftover / "PG_VERSION").touch()
    with server_of(new_project) as server:
        assert query(server, "SELECT 1") == 1
    assert not leftover.exists()


# One's own, for a test


def test_a_scratch_server_is_gone_afterwards():
    with scratch_server() as server:
        assert query(server, "SELECT 1") == 1
        pid, socket_dir = server.pid, server.socket_dir
        assert pid is not None
    assert (server.folder.exists(), socket_dir.exists()) == (False, False)
    wait_until(lambda: not is_alive(pid))


def test_two_scratch_servers_run_at_once():
    with scratch_server() as one, scratch_server() as other:
        assert one.dsn != other.dsn
        assert query(one, "SELECT 1") == query(other, "SELECT 1")


@pytest.mark.parametrize("stop_mode", ["fast", "immediate"])
def test_a_restarted_server_has_the_same_address_and_all_that_was_committed(stop_mode):
    with scratch_server() as server:
        dsn, pid = server.dsn, server.pid
        query(server, KEEP)
        server.restart(stop_mode)
        assert server.pid != pid
        assert server.dsn == dsn
        assert query(server, "SELECT answer FROM kept") == 42


def test_a_stopped_server_starts_again():
    with scratch_server() as server:
        server.stop("immediate")
        assert not server.is_ready
        server.stop()
        server.start()
        assert query(server, "SELECT 1") == 1


# Behind Django


def test_a_server_that_does_not_start_is_an_operational_error_with_its_own_words(new_project):
    server = server_of(new_project)
    with server:
        pass
    (server.data / "global" / "pg_control").unlink()
    with pytest.raises(OperationalError, match="pg_control"):
        wrapper_for(new_project).connect()


def test_a_connection_of_django_starts_the_server(project, django_db_blocker):
    with django_db_blocker.unblock(), leaving(server_of(project)) as server:
        wrapper = wrapper_for(project)
        wrapper.connect()
        found = wrapper.connection.execute("SHOW data_directory").fetchone()
        wrapper.close()
        assert found == (str(server.data),)


def test_dbshell_starts_the_server(project, capfd):
    if not shutil.which("psql"):
        pytest.skip("there is no psql on the PATH")
    with leaving(server_of(project)) as server:
        wrapper_for(project).client.runshell(["-c", "SHOW data_directory"])
        assert str(server.data) in capfd.readouterr().out


def run_django(copy: Path, environment: dict[str, str], *arguments: str) -> str:
    """Run Python in a copy of this project and return what it prints."""
    for name in ("project", "kanthorq_django"):
        shutil.copytree(REPOSITORY / name, copy / name)
    shutil.copy(REPOSITORY / "manage.py", copy)
    own = {"PYTHONPATH": python_path(copy), "DJANGO_SETTINGS_MODULE": "project.settings"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=environment | own,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


CONNECT = """
import django
from django.db import connection
django.setup()
with connection.cursor() as cursor:
    cursor.execute("SHOW data_directory")
    print(cursor.fetchone()[0])
"""


def test_check_starts_no_server(new_project, environment):
    run_django(new_project, environment, "manage.py", "check")
    assert not (new_project / ".postgres").exists()


def test_the_first_connection_of_the_project_starts_a_server(new_project, environment):
    data = run_django(new_project, environment, "-c", CONNECT)
    assert data.startswith(str(new_project / ".postgres"))


def test_database_url_wins(new_project, environment):
    with scratch_server() as server:
        url = {"DATABASE_URL": server.dsn}
        data = run_django(new_project, environment | url, "-c", CONNECT)
        assert data.strip() == str(server.data)
    assert not (new_project / ".postgres").exists()


def test_without_debug_a_secret_key_is_demanded(new_project, environment, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        run_django(new_project, environment | {"DEBUG": "off"}, "-c", "import project.settings")
    assert "Set the SECRET_KEY environment variable" in capfd.readouterr().err
