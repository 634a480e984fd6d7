"""Command lines: each does what it says or is refused in a sentence, and nothing is half-done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from django.core.management.base import CommandError
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django.management.verbs import VERBS
from kanthorq_django.models import Event, Task, TaskState
from tests.commands.console import DEADLINE, environment, kanthorq
from tests.factories import TaskFactory
from tests.fuzz.adversarial import examples, mostly, names, subjects, texts
from tests.fuzz.doors import knocked
from tests.fuzz.oracle import assert_sentence
from tests.fuzz.targets.commands import SPELLINGS

words = st.sampled_from(SPELLINGS) | texts | names
EVENT = "01a1f9d1-0000-7000-8000-000000000000"
# Of each branch: the options that it has, and what is usually given with them.
FILTERS = {
    "--consumer": "refunds",
    "--state": "retryable",
    "--subject": "order.",
    "--older-than": "7d",
    "--limit": "3",
    "--event": EVENT,
    "--resource-key": "order-17",
}
OPTIONS: dict[str, dict[str, str]] = {
    "tasks": FILTERS,
    "prune": {"--older-than": "7d", "--batch": "10"},
    "grants": {"--schema": "queue"},
    "health": {"--max-lag": "1m", "--min-workers": "0", "--skip": "lag", "--max-dead-rows": "0.5"},
    "reencrypt": {"--batch": "10"},
}
SWITCHES = {
    "tasks": ("--json", "--json", "--yes", "--dry-run"),
    "prune": ("--yes", "--dry-run"),
    "reencrypt": ("--yes", "--dry-run", "--decrypt"),
    "schedules": ("--json", "--yes"),
    "stats": ("--json",),
    "health": ("--json",),
}
BRANCHES = [
    *([name] for name, verb in VERBS.items() if not isinstance(verb, tuple)),
    *([name, each] for name, verb in VERBS.items() if isinstance(verb, tuple) for each in verb[1]),
]


@pytest.fixture
def task(db: None) -> Task:
    retried: Task = TaskFactory.create(state=TaskState.RETRYABLE, consumer__name="refunds")
    return retried


def run(*words_: str) -> None:
    """Run the command; fail unless what it refuses is a sentence."""
    try:
        with knocked(SystemExit):  # --help, --version, and bad health
            kanthorq(*words_)
    except CommandError as error:
        # The parser quotes what it does not know as it came: that is Django's own sentence.
        if not str(error).startswith("Error: "):
            assert_sentence(error)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command line of which little is wrong."""
    line = list(draw(st.sampled_from(BRANCHES).filter(lambda branch: branch != ["rebase"])))
    known = OPTIONS.get(line[0], {"--reason": "why"})
    for option in draw(st.lists(st.sampled_from(sorted(known)), max_size=2)):
        value = draw(mostly(known[option], words))
        line += [f"{option}={value}"] if draw(st.booleans()) else [option, value]
    switches = st.sampled_from(SWITCHES.get(line[0], ("--verbosity=1",)))
    line += draw(st.lists(switches, max_size=2, unique=True))
    return [*line, "--", *draw(mostly([], st.lists(words, max_size=2)))]


@examples(80)
@given(line=lines())
def test_any_command_line_is_carried_out_or_refused_in_a_sentence(task: Task, line: list[str]):
    run(*line)


@examples(80)
@given(
    subject=st.just("order.paid") | subjects,
    body=texts,
    kind=st.sampled_from(([], ["--json"], ["--text"])),
    option=st.sampled_from(
        ("--stream", "--metadata", "--resource-key", "--idempotency-key", "--schedule-at", "--file")
    ),
    value=words,
)
def test_publish_stores_the_body_as_it_was_given(
    task: Task, subject: str, body: str, kind: list[str], option: str, value: str
):
    before = set(Event.objects.values_list("pk", flat=True))
    value = f"./{value}" if option == "--file" else value
    given_body = [] if option == "--file" or body == "-" else [body]
    run("publish", *kind, f"{option}={value}", "--", subject, *given_body)
    for event in Event.objects.exclude(pk__in=before):
        assert event.subject == subject
        assert bytes(event.body) == "".join(given_body).encode()


@examples(60)
@given(json=st.sampled_from(('"a"', "1.10", "[1, 1e5]", '{"a": 1, "a": 2}', " null ", '"\\u00e4"')))
def test_checked_json_keeps_its_spelling(task: Task, json: str):
    ran = kanthorq("publish", "order.paid", json, "--json")
    assert bytes(Event.objects.get(pk=ran.out.strip()).body) == json.encode()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "line",
    [
        [b"kanthorq", b"tasks", b"list", b"--subject", b"order.\xff"],
        [b"kanthorq", b"schedules", b"show", b"\xff\xfe"],
        [b"kanthorq", b"publish", b"order.paid", b"\xed\xa0\x80", b"--reason", b"\xff"],
        [b"kanthorq", b"tasks", b"cancel", b"--resource-key", b"\x1b[31m%s{0}", b"--yes"],
        [b"runworker", b"refunds\xff", b"--concurrency", b"1"],
    ],
)
def test_a_process_never_ends_in_a_traceback(line: list[bytes]):
    ran = subprocess.run(
        [sys.executable.encode(), b"manage.py", line[0], b"--skip-checks", *line[1:]],
        env=environment(),
        cwd=Path(django_settings.BASE_DIR),
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert b"Traceback" not in ran.stderr, ran.stderr.decode()
    assert ran.returncode in (0, 1, 2), os.fsdecode(ran.stderr)
    assert ran.returncode == 0 or ran.stderr.strip()
