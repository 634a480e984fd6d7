"""``manage.py kanthorq`` as a person and as cron meet it: exit status, pipes, terminals."""

import subprocess
from pathlib import Path
from uuid import UUID

import pytest
from django.conf import settings
from django.core.management.base import CommandError
from django.db import connection

from kanthorq_django import publish_many
from kanthorq_django.management.verbs import VERBS
from kanthorq_django.management.verbs.verb import VerbTree
from kanthorq_django.models import Event, Task, Worker
from tests.commands.console import command, environment, kanthorq, manage, on_terminal
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

NOWHERE = "postgres://nobody@127.0.0.1:1/nowhere"


def paths(tree: VerbTree, *above: str) -> list[tuple[str, ...]]:
    found = []
    for name, verb in tree.items():
        found.append((*above, name))
        if isinstance(verb, tuple):
            found += paths(verb[1], *above, name)
    return found


@pytest.mark.parametrize("verb", [(), *paths(VERBS)], ids=" ".join)
def test_every_help_has_a_description_and_an_example(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    assert kanthorq(*verb, "--help").status == 0

    _usage, _, text = capsys.readouterr().out.partition("\n\n")
    assert text[0].isupper()
    assert f"examples:\n  manage.py kanthorq {' '.join(verb)}" in text


def test_an_event_goes_in_by_a_pipe_and_its_id_comes_out():
    ran = manage("publish", "report.ready", "-", stdin=b"\xff\x00")

    assert ran.status == 0
    assert bytes(Event.objects.get(pk=UUID(ran.out.strip())).body) == b"\xff\x00"


def test_options_of_django_are_taken_before_and_after_the_verb():
    ran = manage("--no-color", "stats", "-v", 0, "--json", "--traceback", "--skip-checks")

    assert ran.status == 0, ran.err
    assert set(ran.json) == {"streams", "consumers", "workers"}


@pytest.mark.parametrize(
    ("arguments", "status", "fact"),
    [
        ((), 2, "VERB"),
        (("publish", "order..paid"), 1, "empty token"),
        (("prune", "--older-than", "7x"), 2, "is not a duration"),
        (("prune", "--older-than", "7d"), 1, "add --yes, or --dry-run"),
        (("tasks", "cancel", "--consumer", "nobody", "--yes"), 1, "no consumer 'nobody'"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_no_traceback(
    arguments: tuple[str, ...], status: int, fact: str
):
    ran = manage(*arguments)

    assert (ran.status, ran.out) == (status, "")
    assert fact in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err


def test_a_database_that_is_away_is_one_sentence():
    ran = manage("stats", DATABASE_URL=NOWHERE)

    assert (ran.status, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("CommandError: The database 'default' cannot be reached: ")


def test_health_of_a_database_that_is_away_is_a_finding():
    ran = manage("health", "--json", DATABASE_URL=NOWHERE)

    assert (ran.status, ran.err) == (1, "")
    first, *others = ran.json["checks"]
    assert (first["name"], first["status"]) == ("database", "failed")
    assert {check["status"] for check in others} == {"skipped"}


@pytest.mark.parametrize("arguments", [("publish", "order.paid"), ("rebase", "--yes")])
def test_a_database_without_tables_names_the_migration(arguments: tuple[str, ...]):
    ran = manage(*arguments, TESTED_DATABASE="postgres")

    assert (ran.status, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert "run: manage.py migrate kanthorq_django --database default" in line


@pytest.mark.django_db
@pytest.mark.parametrize(
    "arguments",
    [
        ("sync",),
        ("stats",),
        ("tasks", "list"),
        ("tasks", "cancel", "--state", "available", "--yes"),
        ("prune", "--older-than", "7d", "--yes"),
    ],
    ids=" ".join,
)
def test_a_database_with_older_tables_names_the_migration(arguments: tuple[str, ...]):
    with connection.cursor() as cursor:
        for table in ("stream", "consumer", "task"):
            cursor.execute(f"ALTER TABLE kanthorq_django_{table} RENAME TO old_{table}")

    with pytest.raises(CommandError, match=r"run: manage\.py migrate kanthorq_django"):
        kanthorq(*arguments)


def test_a_database_that_is_not_postgresql_is_one_sentence(tmp_path: Path):
    ran = manage("stats", DATABASE_URL=f"sqlite:///{tmp_path}/db.sqlite3")

    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "CommandError: The database 'default' is not PostgreSQL.\n"


def many_tasks(count: int) -> None:
    """More of them than fit into a pipe, when each is a line."""
    consumer = ConsumerFactory.create(name="refunds")
    events = publish_many(
        (Event(subject="order.paid") for _ in range(count)), stream=consumer.stream.name
    )
    Task.objects.bulk_create(Task(consumer=consumer, event=event) for event in events)


def read_one_line(*args: object) -> tuple[int, bytes]:
    """Run it with a reader that leaves after a line; return its exit status and its stderr."""
    process = subprocess.Popen(
        command(*args),
        # Unbuffered, Python takes a write that was cut short for a whole one.
        env=environment() | {"PYTHONUNBUFFERED": ""},
        cwd=settings.BASE_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    return process.returncode, said


def test_a_closed_pipe_ends_a_listing_quietly():
    many_tasks(500)

    assert read_one_line("tasks", "list", "--limit", 500, "--json") == (1, b"")


def test_a_closed_pipe_does_not_stop_what_was_asked_for_halfway():
    many_tasks(3_000)

    _, said = read_one_line("tasks", "cancel", "--consumer", "refunds", "--yes")

    assert said == b"3,000 updated, 0 requested, 0 noop.\n"
    assert Task.objects.cancelled().count() == 3_000


def redirected(target: str, *args: object) -> tuple[int, list[str]]:
    """Run it with its stdout to ``target`` of a shell; return its status and lines on stderr."""
    process = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {target}', "sh", *command(*args)],
        env=environment(),
        cwd=settings.BASE_DIR,
        stderr=subprocess.PIPE,
        check=False,
    )
    return process.returncode, process.stderr.decode().splitlines()


UNWRITABLE = pytest.mark.parametrize(
    ("target", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "it is closed")],
)


@UNWRITABLE
def test_stdout_that_takes_nothing_does_not_stop_what_was_asked_for(target: str, reason: str):
    many_tasks(2_500)

    status, said = redirected(target, "tasks", "cancel", "--all", "--yes")

    assert Task.objects.cancelled().count() == 2_500
    assert status == 1
    assert said == [
        "2,500 updated, 0 requested, 0 noop.",
        f"CommandError: What was asked for was done, but stdout could not be written: {reason}.",
    ]


@UNWRITABLE
def test_the_id_of_an_event_is_told_when_stdout_takes_nothing(target: str, reason: str):
    status, said = redirected(target, "publish", "order.paid")

    told = f"The event {Event.objects.get().pk} was published, but stdout could not be written"
    assert (status, said) == (1, [f"CommandError: {told}: {reason}."])


@UNWRITABLE
@pytest.mark.parametrize(
    "arguments",
    [
        ("tasks", "list", "--json"),
        ("stats",),
        ("grants",),
        ("tasks", "cancel", "--all", "--dry-run", "--json"),
    ],
    ids=" ".join,
)
def test_a_listing_that_cannot_be_written_is_one_sentence(
    arguments: tuple[str, ...], target: str, reason: str
):
    told = f"CommandError: Stdout could not be written: {reason}."

    assert redirected(target, *arguments) == (1, [told])


def test_what_went_wrong_is_told_beside_what_could_not_be_written():
    status, said = redirected(">/dev/full", "health", "--skip", "lag")

    assert (status, said) == (1, ["Stdout could not be written: No space left on device."])


def test_what_nobody_can_be_told_on_stderr_stops_no_work_either():
    TaskFactory.create()

    assert redirected(">/dev/null 2>/dev/full", "tasks", "cancel", "--all", "--yes") == (0, [])
    assert redirected(">/dev/null 2>&-", "tasks", "reset", "--all", "--yes") == (0, [])
    assert Task.objects.available().count() == 1


def test_a_subject_that_the_encoding_of_stdout_lacks_is_escaped():
    TaskFactory.create(event__subject="order.bezahlt.größe")

    ran = manage("tasks", "list", PYTHONIOENCODING="ascii")

    assert ran.status == 0, ran.err
    assert "gr\\xf6\\xdfe" in ran.out


def test_yes_on_a_terminal_acts():
    task = TaskFactory.create(consumer__name="refunds")

    ran = on_terminal(
        "tasks", "cancel", "--consumer", "refunds", question="Cancel 1 task? [y/N] ", answer="y"
    )

    assert ran.status == 0
    assert f"updated       {task.event_id}" in ran.out
    assert Task.objects.cancelled().count() == 1


@pytest.mark.parametrize("answer", ["n", ""])
def test_any_other_answer_changes_nothing(answer: str):
    TaskFactory.create(consumer__name="refunds")

    ran = on_terminal(
        "tasks", "cancel", "--all", "--state", "available", question="[y/N] ", answer=answer
    )

    assert ran.status == 1
    assert "Nothing was changed." in ran.out
    assert not Task.objects.cancelled().exists()


def test_all_on_a_terminal_still_needs_yes():
    TaskFactory.create()

    ran = on_terminal("tasks", "cancel", "--all", question="\n", answer="y")

    assert ran.status == 1
    assert "--all together with --yes" in ran.out
    assert not Task.objects.cancelled().exists()


def test_prune_asks_with_the_counts_and_shows_a_bar_on_a_terminal():
    stream = StreamFactory.create(name="audit")
    EventFactory.create_batch(3, stream=stream)

    ran = on_terminal(
        "prune", "--older-than", "0s", "--stream", "audit", "--batch", 2,
        question="Delete 3 events and 0 tasks that are done with for 0s? [y/N] ", answer="yes",
    )  # fmt: skip

    assert ran.status == 0
    assert " 67% 2 events" in ran.out
    assert "[##############################] 100% 3 events" in ran.out
    assert "3 events and 0 tasks pruned" in ran.out
    assert not Event.objects.exists()


def test_prune_shows_no_bar_in_a_pipe():
    EventFactory.create(stream=StreamFactory.create(name="audit"))

    ran = manage("prune", "--older-than", "0s", "--stream", "audit", "--yes")

    assert (ran.out, ran.err) == ("1 event and 0 tasks pruned\n", "")


def test_rebase_asks_on_a_terminal():
    ConsumerFactory.create(name="refunds", cluster_id=17)

    ran = on_terminal(
        "rebase",
        question="Rebase 1 consumer of the database 'default' and add 0 tasks? [y/N] ",
        answer="n",
    )

    assert ran.status == 1
    assert "Nothing was changed." in ran.out


def test_colour_is_for_terminals_and_not_for_those_who_refuse_it():
    Worker.objects.create(host="here", pid=1, concurrency=1)
    coloured = on_terminal("health", "--skip", "lag", question="transactions", answer="")
    plain = on_terminal("health", "--no-color", question="transactions", answer="")

    assert "\x1b[" in coloured.out
    assert "\x1b[" not in plain.out
