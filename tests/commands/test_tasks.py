import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import OperationalError, transaction
from django.db.models.functions import Now
from pytest_django import Settings

from kanthorq_django.domain import states
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.management.verbs.tasks import moving
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.batch import move_batch
from kanthorq_django.models.task import TaskQuerySet
from tests.commands.console import Terminal, kanthorq
from tests.concurrency import (
    DEADLINE_SECONDS,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = pytest.mark.django_db

VERBS = ("cancel", "resume", "release", "reset")


@pytest.fixture
def refunds() -> Consumer:
    return ConsumerFactory.create(name="refunds", stream__name="orders")


@pytest.fixture
def shipping(refunds: Consumer) -> Consumer:
    return ConsumerFactory.create(name="shipping", stream=refunds.stream)


def listed(*filters: object) -> set[UUID]:
    return {UUID(task["event"]) for task in kanthorq("tasks", "list", "--json", *filters).json}


class TestList:
    def test_a_line_tells_what_an_operator_looks_for(self, refunds: Consumer):
        task = TaskFactory.create(
            consumer=refunds,
            state=TaskState.RETRYABLE,
            event__subject="order.paid",
            event__resource_key="order-17",
        )

        head, line = kanthorq("tasks", "list").lines

        assert head.split()[:4] == ["EVENT", "CONSUMER", "STATE", "ATTEMPTS"]
        assert line.split()[:4] == [str(task.event_id), "refunds", "retryable", "1/16"]
        assert line.split()[-2:] == ["order-17", "order.paid"]

    def test_columns_are_aligned(self, refunds: Consumer):
        for subject in ("a", "order.paid.very.late"):
            TaskFactory.create(consumer=refunds, event__subject=subject)

        head, *lines = kanthorq("tasks", "list").lines

        starts = [line.rindex(line.split()[-1]) for line in lines]
        assert starts == [head.index("SUBJECT")] * 2

    def test_without_tasks_there_is_only_the_head(self):
        assert len(kanthorq("tasks", "list").lines) == 1
        assert kanthorq("tasks", "list", "--json").json == []

    def test_what_the_limit_left_out_is_told_beside_the_data(self, refunds: Consumer):
        first, _ = TaskFactory.create_batch(2, consumer=refunds)

        ran = kanthorq("tasks", "list", "--limit", 1, "--json")

        assert [task["event"] for task in ran.json] == [str(first.event_id)]
        assert "There are more" in ran.err

    def test_the_newest_come_first_where_they_are_asked_for(self, refunds: Consumer):
        tasks = TaskFactory.create_batch(3, consumer=refunds)

        told = kanthorq("tasks", "list", "--newest", "--limit", 2, "--json").json

        assert [task["event"] for task in told] == [str(tasks[at].event_id) for at in (2, 1)]

    def test_each_filter_narrows(self, refunds: Consumer, shipping: Consumer):
        paid = TaskFactory.create(
            consumer=refunds, event__subject="order.paid", event__resource_key="order-17"
        )
        other = TaskFactory.create(
            consumer=shipping, event__subject="parcel.sent", state=TaskState.DISCARDED
        )
        Task.objects.filter(pk=paid.pk).update(created_at=Now() - timedelta(hours=3))

        assert listed() == {paid.event_id, other.event_id}
        for narrow in (
            ("--consumer", "refunds"),
            ("--state", "available"),
            ("--resource-key", "order-17"),
            ("--event", paid.event_id),
            (paid.event_id,),
            ("--subject", "order."),
            ("--older-than", "2h"),
        ):
            assert listed(*narrow) == {paid.event_id}, narrow
        assert listed("--state", "final") == {other.event_id}
        assert listed("--stream", "orders") == {paid.event_id, other.event_id}
        assert listed(
            "--consumer", "refunds", "--consumer", "shipping", "--state", "discarded"
        ) == {other.event_id}

    def test_a_task_whose_event_was_deleted_by_sql_is_listed(self, refunds: Consumer):
        kept, task = TaskFactory.create_batch(2, consumer=refunds, event__subject="order.paid")
        Event.objects.filter(pk=task.event_id)._raw_delete("default")

        _, *lines = kanthorq("tasks", "list").lines

        assert [line.split("  ")[-1] for line in lines] == [
            "order.paid",
            "(the event was deleted)",
        ]
        told = kanthorq("tasks", "list", "--json").json
        assert [(each["event"], each["subject"]) for each in told] == [
            (str(kept.event_id), "order.paid"),
            (str(task.event_id), None),
        ]

    def test_stuck_is_running_with_a_lease_that_ran_out(self, refunds: Consumer):
        TaskFactory.create(consumer=refunds, state=TaskState.RUNNING)
        stuck = TaskFactory.create(
            consumer=refunds, state=TaskState.RUNNING, schedule_at=Now() - timedelta(minutes=1)
        )

        assert listed("--state", "stuck") == {stuck.event_id}

    def test_a_percent_sign_is_no_wildcard(self, refunds: Consumer):
        TaskFactory.create(consumer=refunds, event__subject="order.paid")

        assert listed("--subject", "%") == set()


class TestShow:
    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_without_a_match_the_status_is_one(self, options: tuple[str, ...]):
        assert kanthorq("tasks", "show", uuid4(), *options).status == 1
        assert kanthorq("tasks", "show", TaskFactory.create().event_id, *options).status == 0

    def test_everything_about_the_task_and_its_event_is_printed(self, refunds: Consumer):
        task = TaskFactory.create(
            consumer=refunds,
            state=TaskState.DISCARDED,
            event__body={"order": 17},
            event__metadata={"by": "ops"},
            attempted_errors=[
                {
                    "at": "2026-11-20T16:00:00+00:00",
                    "attempt": 1,
                    "verb": "handle",
                    "error": "ValueError: no",
                    "stack": "Traceback\n  File x\nValueError: no",
                }
            ],
        )

        out = kanthorq("tasks", "show", task.event_id).out

        for fact in ('{"order": 17}', '{"by": "ops"}', "discarded", "1 of 16", "ValueError: no"):
            assert fact in out
        assert f"refunds: task {task.pk}" in out

    def test_all_moments_are_told_in_the_zone_of_the_project_with_their_offset(
        self, refunds: Consumer, settings: Settings
    ):
        settings.TIME_ZONE = "Europe/Berlin"
        at = datetime(2026, 11, 20, 16, tzinfo=UTC)
        history = [{"at": at.isoformat(), "attempt": 1, "verb": "handle", "error": "E"}]
        task = TaskFactory.create(consumer=refunds, attempted_at=at, attempted_errors=history)

        ran = kanthorq("tasks", "show", task.event_id)
        (told,) = kanthorq("tasks", "show", task.event_id, "--json").json

        assert "last attempt     2026-11-20 17:00:00+01:00" in ran.out
        assert "handle 1         2026-11-20 17:00:00+01:00  E" in ran.out
        assert told["attempted_errors"][0]["at"] == "2026-11-20T16:00:00+00:00"

    def test_json_holds_the_body_as_text_or_in_base64(self, refunds: Consumer):
        text = TaskFactory.create(consumer=refunds, event__body="héllo")
        binary = TaskFactory.create(consumer=refunds, event__body=b"\xff\x00")

        shown = kanthorq("tasks", "show", "--json", text.event_id, binary.event_id).json

        bodies = [(task["event"]["body"], task["event"]["body_encoding"]) for task in shown]
        assert bodies == [("héllo", "utf-8"), ("/wA=", "base64")]

    def test_a_body_cannot_steer_the_terminal(self, refunds: Consumer):
        task = TaskFactory.create(consumer=refunds, event__body="\x1b[2Jgone\n")
        binary = TaskFactory.create(consumer=refunds, event__body=b"\xff" * 65)

        out = kanthorq("tasks", "show", task.event_id, binary.event_id).out

        assert "\\x1b[2Jgone\\n" in out
        assert "\x1b" not in out
        assert "ff ff …" in out

    @pytest.mark.parametrize(
        ("stored", "errors"),
        [
            (["text", 7, None, {}], ["text", "7", "null", "{}"]),
            ([{"error": "ValueError: no"}], ["ValueError: no"]),
            ([{"error": {"a": 1}, "stack": None, "at": 5, "attempt": []}], ['{"a": 1}']),
            ([{"attempt": 1, "password": "s3cret"}], ['{"attempt": 1, "password": "[redacted]"}']),
            ({"error": "none", "attempt": {"password": "s3cret"}}, ["none"]),
            ("text", ["text"]),
            (7, ["7"]),
        ],
    )
    def test_a_history_of_another_shape_is_shown(
        self, stored: object, errors: list[str], refunds: Consumer
    ):
        task = TaskFactory.create(consumer=refunds, attempted_errors=stored)

        ran = kanthorq("tasks", "show", task.event_id)
        as_json = kanthorq("tasks", "show", task.event_id, "--json")

        assert [line.split("  ")[-1] for line in ran.lines[-len(errors) :]] == errors
        (told,) = as_json.json
        assert [entry["error"] for entry in told["attempted_errors"]] == errors
        assert "s3cret" not in ran.out + as_json.out

    @pytest.mark.parametrize(
        ("state", "is_told"), [(TaskState.AVAILABLE, True), (TaskState.COMPLETED, False)]
    )
    def test_only_what_has_not_ended_is_due(
        self, refunds: Consumer, state: TaskState, *, is_told: bool
    ):
        task = TaskFactory.create(consumer=refunds, state=state)
        assert ("due   " in kanthorq("tasks", "show", task.event_id).out) is is_told

    def test_a_task_whose_event_was_deleted_by_sql_is_shown(self, refunds: Consumer):
        task = TaskFactory.create(consumer=refunds, event__subject="order.paid")
        Event.objects.filter(pk=task.event_id)._raw_delete("default")

        out = kanthorq("tasks", "show", task.event_id).out
        (told,) = kanthorq("tasks", "show", task.event_id, "--json").json

        assert f"refunds: task {task.pk}" in out
        assert f"event            {task.event_id}" in out
        assert "subject          (the event was deleted)" in out
        assert "attempts         0 of 16" in out
        assert told["event"] == {
            "id": str(task.event_id),
            "stream": "orders",
            "subject": None,
            "metadata": None,
            "body": None,
            "body_encoding": "deleted",
            "idempotency_key": None,
            "schedule_at": None,
            "created_at": None,
        }

    def test_it_wants_to_know_which_tasks(self):
        with pytest.raises(CommandError, match="Say which tasks"):
            kanthorq("tasks", "show")

    def test_events_without_a_task_are_told_apart(self, refunds: Consumer):
        shown = TaskFactory.create(consumer=refunds)
        unread, unknown = EventFactory.create(stream=refunds.stream).pk, uuid4()

        ran = kanthorq("tasks", "show", shown.event_id, unread, unknown)
        left_out = kanthorq("tasks", "show", shown.event_id, "--state", "completed")

        assert f"task {shown.pk}" in ran.out
        assert ran.err == (
            f"Unknown: event {unknown}.\n"
            f"Without a task yet (not pulled, or selected by no consumer): event {unread}.\n"
        )
        assert left_out.err == (
            f"No task matches.\nLeft out by the other filters: event {shown.event_id}.\n"
        )

    def test_what_a_limit_cuts_off_is_not_explained(self, refunds: Consumer):
        tasks = TaskFactory.create_batch(2, consumer=refunds)

        ran = kanthorq("tasks", "show", *(task.event_id for task in tasks), "--limit", "1")

        assert ran.err == ""


class TestMoving:
    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("state", TaskState)
    def test_each_verb_tells_of_each_state_what_it_did_and_what_it_would_do(
        self, verb: str, state: TaskState, refunds: Consumer
    ):
        task = TaskFactory.create(consumer=refunds, state=state)
        targets = states.targets(verb, state)

        dry = kanthorq("tasks", verb, task.event_id, "--dry-run")
        task.refresh_from_db()
        assert task.state == state
        ran = kanthorq("tasks", verb, task.event_id, "--yes")
        task.refresh_from_db()

        word = "updated" if targets else "noop"
        would = "would-update" if targets else "noop"
        assert ran.words == [[word, str(task.event_id), "refunds"]]
        assert dry.words == [[would, str(task.event_id), "refunds"]]
        assert f"1 {word}" in ran.err
        assert "nothing was changed" in dry.err
        assert task.state == (targets[0] if targets else state)

    def test_running_tasks_are_asked_to_stop_once(self, refunds: Consumer):
        task = TaskFactory.create(consumer=refunds, state=TaskState.RUNNING)
        arguments = ("tasks", "cancel", "--running", "--consumer", "refunds")

        assert kanthorq(*arguments, "--dry-run").words[0][0] == "would-request"
        assert kanthorq(*arguments, "--yes").words[0][0] == "requested"
        assert kanthorq(*arguments, "--dry-run").words[0][0] == "noop"
        assert kanthorq(*arguments, "--yes").words[0][0] == "noop"
        task.refresh_from_db()
        assert task.cancel_requested_at is not None

    def test_one_event_is_told_for_each_of_its_consumers(
        self, refunds: Consumer, shipping: Consumer
    ):
        event = EventFactory.create(stream=refunds.stream)
        TaskFactory.create(consumer=refunds, event=event, state=TaskState.AVAILABLE)
        TaskFactory.create(consumer=shipping, event=event, state=TaskState.COMPLETED)

        told = kanthorq("tasks", "cancel", "--event", event.pk, "--yes", "--json").json

        assert told == {
            "verb": "cancel",
            "dry_run": False,
            "updated": [{"event": str(event.pk), "consumer": "refunds"}],
            "requested": [],
            "noop": [{"event": str(event.pk), "consumer": "shipping"}],
        }

    def test_an_event_without_a_task_is_a_noop_with_a_reason(
        self, refunds: Consumer, shipping: Consumer
    ):
        unknown, unread = uuid4(), EventFactory.create(stream=refunds.stream).pk
        elsewhere = TaskFactory.create(consumer=shipping).event_id
        events = (unknown, unread, elsewhere)
        reasons = (
            f"Unknown: event {unknown}.",
            f"Without a task yet (not pulled, or selected by no consumer): event {unread}.",
            f"Left out by the other filters: event {elsewhere}.",
        )

        ran = kanthorq("tasks", "cancel", *events, "--consumer", "refunds", "--yes")
        dry = kanthorq("tasks", "cancel", *events, "--consumer", "refunds", "--dry-run", "--json")

        assert ran.words == [["noop", str(event), "-"] for event in events]
        assert ran.err.splitlines() == [*reasons, "0 updated, 0 requested, 3 noop."]
        assert [line["event"] for line in dry.json["noop"]] == [*map(str, events)]
        assert dry.err.splitlines() == [*reasons]

    def test_of_many_events_without_a_task_a_few_are_named(self):
        unknown = [uuid4() for _ in range(5)]

        ran = kanthorq("tasks", "cancel", *unknown, "--yes")

        named = ", ".join(map(str, unknown[:3]))
        assert ran.err.splitlines()[0] == f"Unknown: events {named} and 2 others."

    def test_nobody_is_asked_when_there_is_nothing_to_do(
        self, refunds: Consumer, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "stdin", Terminal())
        unread = EventFactory.create(stream=refunds.stream)
        done = TaskFactory.create(consumer=refunds, state=TaskState.COMPLETED)

        ran = kanthorq("tasks", "cancel", unread.pk, done.event_id)

        assert [word for word, *_ in ran.words] == ["noop", "noop"]
        assert "[y/N]" not in ran.err

    def test_the_question_counts_what_would_be_moved(
        self, refunds: Consumer, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "stdin", Terminal("y"))
        TaskFactory.create_batch(2, consumer=refunds)
        TaskFactory.create(consumer=refunds, state=TaskState.COMPLETED)

        ran = kanthorq("tasks", "cancel", "--consumer", "refunds")

        assert ran.err.startswith("Cancel 2 tasks? [y/N] ")
        assert [word for word, *_ in ran.words] == ["updated", "updated", "noop"]

    def test_without_a_match_nothing_is_done_and_that_is_no_error(self, refunds: Consumer):
        ran = kanthorq("tasks", "cancel", "--consumer", "refunds", "--yes")

        assert (ran.out, ran.err) == ("", "0 updated, 0 requested, 0 noop.\n")

    def test_the_limit_takes_the_oldest(self, refunds: Consumer):
        tasks = TaskFactory.create_batch(3, consumer=refunds)

        ran = kanthorq("tasks", "cancel", "--consumer", "refunds", "--limit", 2, "--yes")

        assert [UUID(event) for _, event, _ in ran.words] == [task.event_id for task in tasks[:2]]
        assert Task.objects.cancelled().count() == 2

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("state", TaskState)
    def test_the_limit_counts_only_what_the_verb_moves(
        self, verb: str, state: TaskState, refunds: Consumer
    ):
        task = TaskFactory.create(consumer=refunds, state=state)

        ran = kanthorq("tasks", verb, "--consumer", "refunds", "--limit", 1, "--yes")

        moved = [["updated", str(task.event_id), "refunds"]]
        assert ran.words == (moved if states.targets(verb, state) else [])

    def test_a_repeated_call_with_a_limit_goes_on(self, refunds: Consumer):
        parked = TaskFactory.create_batch(3, consumer=refunds, state=TaskState.PENDING)
        arguments = ("tasks", "release", "--consumer", "refunds", "--limit", 1)

        for task in parked:
            would = kanthorq(*arguments, "--dry-run")
            ran = kanthorq(*arguments, "--yes")
            assert would.words == [["would-update", str(task.event_id), "refunds"]]
            assert ran.words == [["updated", str(task.event_id), "refunds"]]
        assert kanthorq(*arguments, "--yes").lines == []

    def test_the_limit_counts_running_tasks_that_were_not_asked_yet(self, refunds: Consumer):
        running = TaskFactory.create_batch(2, consumer=refunds, state=TaskState.RUNNING)
        arguments = ("tasks", "cancel", "--consumer", "refunds", "--limit", 1, "--yes")

        assert kanthorq(*arguments).lines == []
        for task in running:
            ran = kanthorq(*arguments, "--running")
            assert ran.words == [["requested", str(task.event_id), "refunds"]]
        assert kanthorq(*arguments, "--running").lines == []

    def test_a_given_state_narrows_what_the_limit_counts(self, refunds: Consumer):
        TaskFactory.create(consumer=refunds, state=TaskState.PENDING)
        waiting = TaskFactory.create(consumer=refunds, state=TaskState.RETRYABLE)
        arguments = ("tasks", "cancel", "--consumer", "refunds", "--limit", 1, "--yes")

        assert kanthorq(*arguments, "--state", "completed").lines == []
        ran = kanthorq(*arguments, "--state", "retryable")
        assert ran.words == [["updated", str(waiting.event_id), "refunds"]]

    @pytest.mark.parametrize("limit", [None, 5, 7])
    def test_many_tasks_go_batch_by_batch(
        self, limit: int | None, refunds: Consumer, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(moving, "BATCH", 2)
        TaskFactory.create_batch(7, consumer=refunds)
        bounds = () if limit is None else ("--limit", limit)

        ran = kanthorq("tasks", "cancel", "--state", "available", *bounds, "--yes")

        assert len(ran.lines) == Task.objects.cancelled().count() == (limit or 7)

    @pytest.mark.parametrize(
        ("failure", "ending"),
        [(OperationalError("gone"), CommandError), (KeyboardInterrupt(), SystemExit)],
    )
    def test_json_tells_what_was_done_before_a_batch_failed(
        self,
        failure: BaseException,
        ending: type[BaseException],
        refunds: Consumer,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        monkeypatch.setattr(moving, "BATCH", 2)
        done = TaskFactory.create_batch(2, consumer=refunds)
        refused = TaskFactory.create(consumer=refunds)
        move: Callable[..., Outcome] = moving.Cancel.move

        def fail_later(self: moving.Cancel, tasks: TaskQuerySet, *, running: bool) -> Outcome:
            if refused in tasks:
                raise failure
            return move(self, tasks, running=running)

        monkeypatch.setattr(moving.Cancel, "move", fail_later)

        with pytest.raises(ending):
            call_command("kanthorq", "tasks", "cancel", "--all", "--yes", "--json")

        assert json.loads(capsys.readouterr().out) == {
            "verb": "cancel",
            "dry_run": False,
            "updated": [{"event": str(task.event_id), "consumer": "refunds"} for task in done],
            "requested": [],
            "noop": [],
        }

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("arguments", [(), ("--yes",), ("--all",), ("--limit", 5, "--yes")])
    def test_without_a_filter_it_refuses_to_act(self, verb: str, arguments: tuple[object, ...]):
        task = TaskFactory.create()

        with pytest.raises(CommandError, match=r"Say which tasks: .* --all together with --yes"):
            kanthorq("tasks", verb, *arguments)

        task.refresh_from_db()
        assert task.state == TaskState.AVAILABLE

    def test_zero_seconds_are_no_filter(self):
        with pytest.raises(CommandError, match="Say which tasks"):
            kanthorq("tasks", "cancel", "--older-than", "0s", "--yes")

    @pytest.mark.parametrize("option", ["--subject", "--resource-key"])
    def test_an_empty_shell_variable_does_not_select_everything(self, option: str):
        with pytest.raises(CommandError, match="is empty, which would select everything"):
            kanthorq("tasks", "cancel", option, "", "--yes")

    def test_all_of_them_with_yes(self):
        TaskFactory.create_batch(2)

        assert len(kanthorq("tasks", "cancel", "--all", "--yes").lines) == 2
        assert Task.objects.cancelled().count() == 2

    def test_all_of_them_can_be_rehearsed(self):
        TaskFactory.create()

        assert len(kanthorq("tasks", "cancel", "--all", "--dry-run").lines) == 1
        assert not Task.objects.cancelled().exists()

    def test_without_a_terminal_and_without_yes_it_refuses(self, refunds: Consumer):
        TaskFactory.create(consumer=refunds)

        with pytest.raises(CommandError, match="add --yes, or --dry-run"):
            kanthorq("tasks", "cancel", "--consumer", "refunds")

        assert not Task.objects.cancelled().exists()

    @pytest.mark.parametrize(
        ("filters", "fact"),
        [
            (("--consumer", "refnds"), "no consumer 'refnds'.*did you mean 'refunds'"),
            (("--stream", "ordres"), "no stream 'ordres'.*did you mean 'orders'"),
            (("--state", "avaliable"), "invalid choice: 'avaliable'"),
            (("--event", "17"), "'17' is not an event id; it must be a UUID"),
            (("17",), "'17' is not an event id"),
            (("--older-than", "2 hours"), "is not a duration"),
            (("--limit", "0"), "must be a whole number from 1 to"),
            (("--limit", "many"), "must be a whole number from 1 to"),
            (("--database", "defualt"), "invalid choice"),
        ],
    )
    @pytest.mark.parametrize("verb", ["list", "show", "cancel"])
    @pytest.mark.usefixtures("refunds")
    def test_a_wrong_filter_is_one_sentence(self, verb: str, filters: tuple[str, ...], fact: str):
        with pytest.raises(CommandError, match=fact) as refused:
            kanthorq("tasks", verb, *filters)

        assert "\n" not in str(refused.value)


def test_a_task_claimed_meanwhile_is_told_as_noop(
    refunds: Consumer, monkeypatch: pytest.MonkeyPatch
):
    """Between the lookup of a batch and its move a worker may claim: the locked state decides."""
    task = TaskFactory.create(consumer=refunds)
    move: Callable[..., object] = move_batch

    def claim_first(*args: object, **options: object) -> object:
        refunds.claim()
        return move(*args, **options)

    monkeypatch.setattr(f"{moving.__name__}.move_batch", claim_first)

    ran = kanthorq("tasks", "cancel", task.event_id, "--yes")

    assert ran.words == [["noop", str(task.event_id), "refunds"]]


@pytest.mark.django_db
def test_a_named_event_that_cannot_be_moved_is_told_also_with_a_limit():
    task = TaskFactory.create(state=TaskState.COMPLETED)
    ran = kanthorq("tasks", "cancel", str(task.event_id), "--limit", 3, "--yes")
    assert ran.words == [["noop", str(task.event_id), "-"]]


@pytest.mark.django_db(transaction=True)
def test_what_left_the_selection_before_the_verb_came_to_it_is_a_noop():
    consumer = ConsumerFactory.create(name="refunds")
    held, moved = TaskFactory.create_batch(2, consumer=consumer, state=TaskState.DISCARDED)
    with transaction.atomic():
        assert Task.objects.select_for_update().get(pk=held.pk)
        arguments = ("tasks", "reset", "--state", "discarded", "--yes")
        resetting = begin_elsewhere(lambda: kanthorq(*arguments))
        wait_until(is_waited_for)
        finished = {"state": TaskState.COMPLETED, "result": {"done": 1}}
        elsewhere(lambda: Task.objects.filter(pk=moved.pk).update(**finished))
    ran = resetting.result(DEADLINE_SECONDS)
    assert ran.words == [
        ["updated", str(held.event_id), "refunds"],
        ["noop", str(moved.event_id), "refunds"],
    ]
    moved.refresh_from_db()
    assert (moved.state, moved.result) == (TaskState.COMPLETED, {"done": 1})
