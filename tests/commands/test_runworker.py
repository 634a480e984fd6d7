"""``manage.py runworker`` as a person and as a service manager meet it."""

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command, execute_from_command_line
from django.utils import autoreload

from kanthorq_django import publish, publish_many, subscribe
from kanthorq_django.domain.subscriptions import Registry, registry
from kanthorq_django.management.commands import runworker as command
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState, Worker
from kanthorq_django.subscribers import sync
from kanthorq_django.worker import tuning
from tests.concurrency import elsewhere, wait_until
from tests.ledger import models as touched
from tests.ledger.models import Entry
from tests.processes import PATIENCE, RunningWorker, environment, runworker

pytestmark = pytest.mark.django_db(transaction=True)

NOWHERE = "postgres://nobody@127.0.0.1:1/nowhere"


def run(*arguments: object) -> str:
    """Run the command here, in a thread, as its worker closes its connections at the end."""
    out = StringIO()
    elsewhere(lambda: call_command("runworker", *map(str, arguments), stdout=out, stderr=out))
    return out.getvalue()


def test_a_burst_says_how_many_handlers_it_started():
    publish_many([Event(subject="entry.made") for _ in range(3)], stream="ledger")

    assert run("atomic", "--burst").splitlines()[-1] == "Handled 3 tasks."
    assert Entry.objects.count() == 3


@pytest.mark.parametrize(("young", "meanwhile"), [(700, 30_000), (0, 0), (50_000, 50_000)])
def test_it_collects_garbage_rarely_and_leaves_the_project_its_choice(
    declared: Registry, young: int, meanwhile: int
):
    seen: list[int] = []

    @subscribe("work.>", stream="work", consumer="one")
    def handle(message: Message) -> None:
        seen.append(gc.get_threshold()[0])

    publish("work.due", stream="work")
    former, frozen_count = gc.get_threshold(), gc.get_freeze_count()  # Python 3.12 begins with some
    gc.set_threshold(young, *former[1:])
    try:
        run("one", "--burst")
        assert seen == [meanwhile]
        assert gc.get_threshold()[0] == young
        assert gc.get_freeze_count() <= frozen_count
    finally:
        gc.set_threshold(*former)


@pytest.mark.parametrize(("before", "meanwhile"), [(0.005, 0.001), (0.0005, 0.0005)])
def test_its_threads_take_turns_often_and_no_more_rarely_than_the_projects(
    declared: Registry, before: float, meanwhile: float
):
    seen: list[float] = []

    @subscribe("work.>", stream="work", consumer="one")
    def handle(message: Message) -> None:
        seen.append(sys.getswitchinterval())

    publish("work.due", stream="work")
    former = sys.getswitchinterval()
    sys.setswitchinterval(before)
    try:
        run("one", "--burst")
        assert seen == [pytest.approx(meanwhile)]
        assert sys.getswitchinterval() == pytest.approx(before)
    finally:
        sys.setswitchinterval(former)


def test_garbage_is_collected_now_and_then_though_little_is_done(
    declared: Registry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuning, "COLLECT_EVERY", 0.05)
    gone = threading.Event()

    class Circle:
        def __init__(self) -> None:
            self.itself = self
            weakref.finalize(self, gone.set)

    @subscribe("work.>", stream="work", consumer="one")
    def handle(message: Message) -> None:
        Circle()
        assert gone.wait(PATIENCE)

    publish("work.due", stream="work")
    assert "Handled 1 task.\n" in run("one", "--burst")
    assert Task.objects.get().state == TaskState.COMPLETED


def test_it_says_at_the_start_what_it_works_for():
    line = "Working for async, atomic: up to 7 handlers at a time, database 'default'."
    assert run("atomic", "async", "--burst", "--concurrency", 7).splitlines()[0] == line


def test_several_processes_say_what_each_of_them_does():
    with runworker("atomic", "--processes", 2, "--concurrency", 3) as worker:
        worker.wait_for("Working for atomic: up to 3 handlers at a time in each of 2 processes")
        worker.wait_until_started(2)
        assert worker.terminate() == 0
        assert worker.text.count("Working for") == 1


def test_a_consumer_that_is_named_twice_is_worked_for_once(declared: Registry):
    subscribe("work.>", stream="work", consumer="one")(lambda message: None)
    assert "Working for one: " in run("one", "one", "--burst")
    assert [consumer.name for consumer in elsewhere(lambda: sync(["one", "one"]))] == ["one"]


def test_without_names_it_runs_all_consumers(declared: Registry):
    declared._subscriptions = {}
    for name in ("one", "two"):
        subscribe("work.>", stream="work", consumer=name)(lambda message: None)
    publish("work.due", stream="work")

    said = run("--burst")
    assert "Working for one, two: " in said
    assert "Handled 2 tasks." in said
    assert set(Consumer.objects.values_list("name", flat=True)) == {"one", "two"}


@pytest.mark.parametrize(
    "arguments",
    [["--except", "two,three"], ["--except", "two", "--except=three"], ["--except=two,three,two"]],
    ids=" ".join,
)
def test_it_runs_all_consumers_except_some(declared: Registry, arguments: list[str]):
    declared._subscriptions = {}
    for name in ("one", "two", "three", "four"):
        subscribe("work.>", stream="work", consumer=name)(lambda message: None)
    publish("work.due", stream="work")

    said = run("--burst", *arguments)
    assert "Working for four, one: " in said
    assert "Handled 2 tasks." in said
    assert set(Consumer.objects.values_list("name", flat=True)) == {"one", "four"}


def test_several_processes_leave_out_what_is_excepted():
    names = sorted(subscription.consumer for subscription in registry.all())
    with runworker("--processes", 2, "--except", ",".join(names[1:])) as worker:
        worker.wait_until_started(2)
        assert [row.consumers for row in Worker.objects.all()] == [[names[0]]] * 2


def test_without_any_consumer_left_it_refuses_to_work_for_all(declared: Registry):
    declared._subscriptions = {}
    subscribe("work.>", stream="work", consumer="one")(lambda message: None)

    with pytest.raises(CommandError, match="--except leaves no consumer to work for"):
        run("--burst", "--except", "one")
    assert not Consumer.objects.exists()


def test_every_option_reaches_the_worker():
    publish_many([Event(subject="entry.made") for _ in range(9)], stream="ledger")
    options = "--concurrency 2 --batch-size 2 --poll-interval 0.5 --no-listen --max-tasks 4"
    options += " --shutdown-timeout 3 --pullers primary,retry"

    assert "Handled 4 tasks." in run("atomic", *options.split())
    assert Task.objects.completed().count() == Entry.objects.count() == 4


@pytest.mark.parametrize(
    ("arguments", "status", "fact"),
    [
        (["atomik"], 1, "No subscriber declares the consumer 'atomik'; did you mean 'atomic'?"),
        (
            ["--except", "atomik"],
            1,
            "No subscriber declares the consumer 'atomik'; did you mean 'atomic'?",
        ),
        (["--except", "atomic,"], 1, "No subscriber declares the consumer ''; known: "),
        (["--except"], 2, "argument --except: expected one argument"),
        (["--except", "async", "atomic"], 1, "or leave some out with --except A,B, not both."),
        (["--concurrency", 0], 1, "concurrency must be 1 to 1000, not 0."),
        (["--concurrency", 1_000_000], 1, "concurrency must be 1 to 1000, not 1000000."),
        (["--concurrency", "many"], 2, "argument --concurrency: invalid int value: 'many'"),
        (["--processes", 0], 1, "--processes must be 1 to 256, not 0."),
        (["--processes", "-1"], 1, "--processes must be 1 to 256, not -1."),
        (["--batch-size", 0], 1, "batch_size must be 1 to 10000, not 0."),
        (["--max-tasks", 0], 1, "max_tasks must be at least 1"),
        (["--poll-interval", 0], 1, "must be above zero and at most 1 day, not 0 s."),
        (["--poll-interval", "-0.5"], 1, "must be above zero and at most 1 day, not -0.5 s."),
        (["--poll-interval", "nan"], 2, "'nan' is not a number of seconds"),
        (["--poll-interval", "1e300"], 2, "'1e300' is not a number of seconds"),
        (["--poll-interval", "1e9"], 1, "poll_interval must be above zero and at most 1 day, not "),
        (["--shutdown-timeout", "-1"], 1, "shutdown_timeout must be zero to 1 day, not -1 s."),
        (["--shutdown-timeout", "soon"], 2, "'soon' is not a number of seconds"),
        (["--pullers", "secondary"], 1, "pullers must be some of primary, retry, visibility"),
        (["--pullers", "primary,,retry"], 1, "not 'primary,,retry'."),
        (["--pullers", "primary,"], 1, "not 'primary,'."),
        (["--pullers", ""], 1, "pullers must be some of primary, retry, visibility"),
        (["--speed"], 2, "unrecognized arguments: --speed"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_one_sentence_and_no_traceback(
    arguments: list[object], status: int, fact: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as leaving:
        execute_from_command_line(["manage.py", "runworker", *map(str, arguments)])

    assert leaving.value.code == status
    said = capsys.readouterr().err
    assert fact in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not Worker.objects.exists()


@pytest.mark.parametrize(
    ("variables", "fact"),
    [
        ({"DATABASE_URL": NOWHERE}, "The database 'default' cannot be reached: "),
        ({"TESTED_DATABASE": "no_such_database"}, "The database 'default' cannot be reached: "),
        ({"TESTED_DATABASE": "postgres"}, "run: manage.py migrate kanthorq_django"),
        ({"DATABASE_URL": "sqlite:///:memory:"}, "The database 'default' is not PostgreSQL."),
    ],
    ids=str,
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_database_that_cannot_be_used_is_one_sentence(
    variables: dict[str, str], fact: str, processes: int
):
    with runworker("atomic", "--processes", processes, **variables) as worker:
        assert worker.wait() == 1
    (line,) = worker.text.splitlines()  # and not "Working for ..." before
    assert line.startswith("CommandError: ")
    assert fact in line


def test_without_subscribers_it_says_where_to_write_one(declared: Registry):
    declared._subscriptions = {}

    with pytest.raises(CommandError, match=r"write one in <app>/subscribers\.py"):
        run()


def test_a_burst_that_would_never_end_is_refused():
    with pytest.raises(CommandError, match="--reload waits for changes for ever"):
        run("--reload", "--burst")


def test_a_burst_that_leaves_a_refused_consumer_unread_fails():
    sync(["atomic"])
    Consumer.objects.update(cluster_id=1)
    publish("entry.made", stream="ledger")

    with runworker("atomic", "--burst") as worker:
        assert worker.wait() == 1
    assert "manage.py kanthorq rebase" in worker.text.splitlines()[-1]
    assert "Traceback" not in worker.text


def test_debug_is_told_because_it_costs_memory():
    with runworker("atomic", "--burst", DEBUG="true") as worker:
        assert worker.wait() == 0
    assert "DEBUG is on" in worker.text


def test_help_has_an_example():
    ran = subprocess.run(
        [sys.executable, "manage.py", "runworker", "--help"],
        env=environment(),
        cwd=settings.BASE_DIR,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "manage.py runworker refunds emails --concurrency 20" in " ".join(ran.stdout.split())


def test_log_records_tell_consumer_event_attempt_and_milliseconds(caplog: Any):
    @subscribe("work.>", stream="work", consumer="told")
    def handle(message: Message) -> None:
        if message.event.subject == "work.bad":
            raise ValueError("no")

    events = [publish(f"work.{name}", stream="work") for name in ("good", "bad")]
    with caplog.at_level(logging.INFO, "kanthorq_django.worker"):
        run("told", "--burst")

    told = {record.event_id: record for record in caplog.records if hasattr(record, "event_id")}
    for event, level in zip(events, ("INFO", "WARNING"), strict=True):
        record = told[str(event.pk)]
        assert (record.consumer, record.subject) == ("told", event.subject)
        assert (record.attempt, record.levelname) == (1, level)
        assert 0 <= record.milliseconds < 60_000
        json.dumps([record.consumer, record.event_id, record.attempt, record.milliseconds])


def touch_while_any_runs(worker: RunningWorker, pids: list[int]) -> None:
    """Change code until none of ``pids`` is at work any more.

    Again and again, as Django's reloader passes over a change that comes before its first look
    at a file, and a worker may have signed in and handled tasks by then.
    """

    def none_of_them_runs() -> bool:
        is_any_left = not set(pids).isdisjoint(worker.workers())
        if is_any_left:
            os.utime(touched.__file__)
        return not is_any_left

    wait_until(none_of_them_runs, PATIENCE)


def test_reload_starts_a_new_worker_when_code_changes():
    with runworker("gated", "--reload", "--poll-interval", 0.2) as worker:
        (first,) = worker.wait_until_started()
        publish("gated.open", {"gate": ""}, stream="ledger")
        wait_until(lambda: Task.objects.completed().count() == 1, PATIENCE)
        touch_while_any_runs(worker, [first])
        wait_until(lambda: worker.workers() != [], PATIENCE)
        publish("gated.open", {"gate": ""}, stream="ledger")
        wait_until(lambda: Task.objects.completed().count() == 2, PATIENCE)
        assert not Worker.objects.filter(pid=first).exists()  # it ended in good order
    assert Task.objects.filter(result=first).count() == 1


@pytest.mark.parametrize(("options", "is_all"), [([], True), (["--reload"], False)])
def test_a_process_that_waits_for_changes_does_not_end_with_its_worker(
    options: list[str], is_all: bool, monkeypatch: pytest.MonkeyPatch
):
    told: list[bool] = []
    monkeypatch.setattr(autoreload, "run_with_reloader", lambda work, *given: work(*given))
    monkeypatch.setattr(command, "run_process", lambda *_, is_all: told.append(is_all))
    elsewhere(lambda: execute_from_command_line(["manage.py", "runworker", *options]))
    assert told == [is_all]


@pytest.mark.slow
def test_reload_restarts_several_processes_too():
    with runworker("gated", "--reload", "--processes", 2) as worker:
        first = worker.wait_until_started(2)
        touch_while_any_runs(worker, first)
        wait_until(lambda: len(worker.workers()) == 2, PATIENCE)


def test_reload_ends_a_worker_with_coroutines_without_a_traceback():
    with runworker("async", "--reload") as worker:
        (first,) = worker.wait_until_started()
        touch_while_any_runs(worker, [first])
        wait_until(lambda: worker.workers() != [], PATIENCE)
    assert "Traceback" not in worker.text


def test_reload_waits_for_code_that_can_be_imported(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from tests.settings import *\nINSTALLED_APPS = [*INSTALLED_APPS, 'draft']\n"
    )
    code = tmp_path / "draft" / "subscribers.py"
    code.parent.mkdir()
    code.write_text("def (\n")

    def is_at_work_once_mended() -> bool:
        # Again and again, as above, but not so often that no worker comes to its work.
        if time.time() > code.stat().st_mtime + 5:
            code.write_text("")
        return worker.workers() != []

    mine = {"PYTHONPATH": str(tmp_path), "DJANGO_SETTINGS_MODULE": "mine"}
    with runworker("gated", "--reload", **mine) as worker:
        worker.wait_for("SyntaxError")
        wait_until(is_at_work_once_mended, PATIENCE)


def test_reload_waits_for_code_that_can_be_run():
    with runworker("atomik", "--reload") as worker:
        worker.wait_for("did you mean 'atomic'")
        assert worker.is_running
    assert "Traceback" not in worker.text


@pytest.mark.django_db
def test_a_transaction_that_is_open_is_refused_with_what_to_do():
    sync(["atomic"])
    with pytest.raises(CommandError, match=r"in a TestCase use .*drain\(\)"):
        call_command("runworker", "atomic", burst=True)
    assert Consumer.objects.count() == 1  # the test's connection is as it was
