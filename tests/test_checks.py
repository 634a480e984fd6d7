import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.checks import CheckMessage, run_checks
from django.db import connections
from django.test import override_settings

from kanthorq_django import checks, subscribe
from kanthorq_django.domain.subscriptions import Registry


class Elsewhere:
    """Routes KanthorQ's models, or only the one named, to the database ``other``."""

    only: str | None = None

    def db_for_write(self, model: Any, **_: Any) -> str | None:
        ours = model._meta.app_label == "kanthorq_django"
        return "other" if ours and self.only in (None, model.__name__) else None


class Torn(Elsewhere):
    only = "Event"


class Astray:
    """Routes all models to a database that the project does not have."""

    def db_for_write(self, model: Any, **_: Any) -> str:
        return "reprots"


@pytest.fixture(autouse=True)
def project_only(declared: Registry) -> None:
    """Leave out what tests of workers declare: leases as short as can be."""
    for subscription in declared.all():
        if not subscription.place.startswith("project."):
            declared.remove(subscription.consumer)


@pytest.fixture
def reconfigured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change the settings of the tasks' database, without opening a connection."""

    def change(**changes: Any) -> None:
        for name, value in changes.items():
            monkeypatch.setitem(connections["default"].settings_dict, name, value)

    return change


def found(databases: Sequence[str] = ()) -> dict[str, CheckMessage]:
    messages = run_checks(tags=[checks.TAG], databases=databases)
    return {str(message.id).removeprefix("kanthorq_django."): message for message in messages}


def test_the_project_passes_all_checks_without_a_warning():
    assert found() == {}


@pytest.mark.django_db
def test_the_project_passes_all_checks_of_the_server():
    assert found(databases=["default"]) == {}


def manage_check(module: str, path: Path | str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "manage.py", "check", "--fail-level", "WARNING"],
        env=os.environ | {"DJANGO_SETTINGS_MODULE": module, "PYTHONPATH": str(path)},
        cwd=settings.BASE_DIR,
        capture_output=True,
        text=True,
        check=False,
    )


def test_manage_py_check_is_silent_about_the_project():
    checked = manage_check("project.settings")

    assert (checked.returncode, checked.stderr) == (0, "")
    assert "no issues" in checked.stdout


def test_manage_py_check_tells_of_wrong_settings_although_subscribers_need_them(tmp_path: Path):
    text = "from project.settings import *\nKANTHORQ = {'CONCURENCY': 5}\n"
    (tmp_path / "misspelt.py").write_text(text)

    checked = manage_check("misspelt", tmp_path)

    assert checked.returncode == 1
    assert "Did you mean 'CONCURRENCY'?" in checked.stderr
    assert "Traceback" not in checked.stderr


def test_checks_open_no_connection_unless_a_database_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        pytest.fail("a check connected")

    monkeypatch.setattr(type(connections["default"]), "connect", refuse)

    assert found() == {}


def test_every_message_has_a_hint():
    with override_settings(
        KANTHORQ={"LISTENING": True}, USE_TZ=False, DATABASE_ROUTERS=["tests.test_checks.Elsewhere"]
    ):
        messages = found()

    assert messages.keys() == {"E005", "W002", "W003"}
    assert all(message.hint for message in messages.values())


def test_tasks_in_another_database_than_postgresql_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(connections["default"]), "vendor", "sqlite")

    messages = found(databases=["default"])
    assert messages.keys() == {"E001"}
    assert "'default'" in messages["E001"].msg


@override_settings(DATABASE_ROUTERS=["tests.test_checks.Astray"])
def test_a_router_that_names_no_database_is_an_error_and_no_traceback():
    messages = found(databases=["default"])

    assert messages.keys() == {"E001"}
    assert "'reprots'" in messages["E001"].msg
    assert "'default'" in str(messages["E001"].hint)


@pytest.mark.parametrize("version", ["2.9.10 (dt dec pq3 ext lo64)", "3.1.20"])
def test_an_old_driver_is_an_error(version: str, monkeypatch: pytest.MonkeyPatch):
    class Driver:
        __version__ = version

    monkeypatch.setattr(type(connections["default"]), "Database", Driver)

    assert version.split(maxsplit=1)[0] in found()["E002"].msg


def test_a_database_without_autocommit_is_an_error(reconfigured: Callable[..., None]):
    reconfigured(AUTOCOMMIT=False)

    assert found().keys() == {"E010"}


@pytest.mark.parametrize(("version", "ids"), [(14, ["E003"]), (15, []), (18, [])])
def test_a_server_older_than_15_is_an_error(version: int, ids: list[str]):
    messages = list(checks.server_problems("default", f"PostgreSQL {version}.2 on x86_64", version))

    assert [str(message.id)[-4:] for message in messages] == ids


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("CockroachDB CCL v24.1.0 (x86_64-pc-linux-gnu)", "CockroachDB"),
        ("PostgreSQL 15.2-YB-2.25.1.0-b0 on x86_64", "YugabyteDB"),
    ],
)
def test_a_server_that_only_resembles_postgresql_is_an_error(text: str, name: str):
    (message,) = checks.server_problems("default", text, 15)

    assert str(message.id) == "kanthorq_django.E004"
    assert name in message.msg


@pytest.mark.parametrize(
    ("given", "fact", "hint"),
    [
        ({"CONCURENCY": 5}, "no key 'CONCURENCY'", "'CONCURRENCY'"),
        (
            {"CONCURRENCY": "5"},
            "KANTHORQ['CONCURRENCY'] is '5'",
            "10 is the default, and 1,000 the",
        ),
        ({"POLL_INTERVAL": 3}, "must be a datetime.timedelta", "and 1 day the most"),
        ({"AUDIT_RETENTION": 3}, "must be a datetime.timedelta", "and 36,500 days the most"),
        ({"LISTEN": 1}, "must be True or False", "True is the default."),
        (["CONCURRENCY"], "not a dict", "KANTHORQ = {}"),
    ],
)
def test_wrong_settings_are_errors_that_say_what_is_right(given: Any, fact: str, hint: str):
    with override_settings(KANTHORQ=given):
        message = found()["E005"]

    assert fact in message.msg
    assert hint in str(message.hint)


def test_two_subscribers_of_one_consumer_are_an_error(declared: Registry):
    def first(message: Any) -> None: ...

    def second(message: Any) -> None: ...

    subscribe("order.paid", consumer="refunds-twice")(first)
    subscribe("order.refunded", consumer="refunds-twice")(second)

    message = found()["E006"]
    assert "'refunds-twice'" in message.msg
    assert "first" in message.msg
    assert "second" in message.msg


@pytest.mark.parametrize(("seconds", "warns"), [(1, True), (2.9, True), (3, False), (60, False)])
def test_a_lease_too_short_for_renewal_is_a_warning(
    seconds: float, warns: bool, declared: Registry
):
    @subscribe("order.paid", consumer="hasty", visibility_timeout=timedelta(seconds=seconds))
    def hasty(message: Any) -> None: ...

    assert ("W001" in found()) is warns


def test_tasks_beside_the_default_database_are_a_warning():
    @subscribe("order.paid", consumer="apart", atomic=True)
    def book(message: Any) -> None: ...

    with override_settings(DATABASE_ROUTERS=["tests.test_checks.Elsewhere"]):
        messages = found()

    assert messages.keys() == {"W002"}
    assert "'other'" in messages["W002"].msg
    assert re.search("atomic=True of .*apart cover others", str(messages["W002"].hint))


def test_models_apart_from_each_other_are_an_error():
    with override_settings(DATABASE_ROUTERS=["tests.test_checks.Torn"]):
        messages = found()

    assert messages.keys() == {"E007"}
    assert "Event to 'other'" in messages["E007"].msg


def test_listening_on_an_unknown_alias_is_an_error():
    with override_settings(KANTHORQ={"LISTEN_DATABASE": "defualt"}):
        message = found()["E008"]

    assert "'defualt'" in message.msg
    assert "'default'" in str(message.hint)


def test_listening_through_a_pooler_in_transaction_mode_is_a_warning(
    reconfigured: Callable[..., None],
):
    reconfigured(DISABLE_SERVER_SIDE_CURSORS=True)

    assert found().keys() == {"W004"}
    with override_settings(KANTHORQ={"LISTEN": False}):
        assert found() == {}
    with override_settings(KANTHORQ={"LISTEN_DATABASE": "other"}):
        assert found() == {}


@pytest.mark.parametrize(
    ("pool", "warns"),
    [(True, True), ({"max_size": 14}, True), ({"max_size": 15}, False), ({"min_size": 20}, False)],
)
def test_a_pool_with_fewer_connections_than_a_worker_has_threads_is_a_warning(
    pool: Any, warns: bool, reconfigured: Callable[..., None]
):
    reconfigured(OPTIONS={"pool": pool})

    assert ("W005" in found()) is warns


def test_naive_times_are_a_warning():
    with override_settings(USE_TZ=False):
        assert found().keys() == {"W003"}


def test_atomic_requests_are_fine(reconfigured: Callable[..., None]):
    reconfigured(ATOMIC_REQUESTS=True)

    assert found() == {}
