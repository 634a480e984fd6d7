"""The checker itself: sound facts pass, and each kind of damage is found by its own invariant."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import history
from tests.faults.facts import (
    CANCELLED,
    COMMITTED,
    COMPLETED,
    IN_DOUBT,
    LOST,
    ROLLED_BACK,
    Contract,
    Effect,
    EventRow,
    Facts,
    Handling,
    Operation,
    Publication,
    TaskRow,
)
from tests.faults.history import History
from tests.faults.invariants import judge

EXACT = Contract(subject="order", is_exact=True, is_strict=True, has_cancel_handler=True)
CALL = Handling(
    consumer="exact",
    event="e1",
    task=1,
    epoch=1,
    verb="handle",
    who="w1",
    outcomes=frozenset({COMMITTED}),
)
TASK = TaskRow(
    id=1, consumer="exact", event="e1", state=COMPLETED, epoch=1, attempts=1, failures=0, key="k"
)
TASK_2 = replace(TASK, id=2, event="e2")
DONE = Effect(kind="done", event="e1", consumer="exact", epoch=1)
DONE_2 = replace(DONE, event="e2")
SOUND = Facts(
    contracts={"exact": EXACT},
    publications=[Publication(events=frozenset({"e1", "e2"}), outcome=COMMITTED)],
    handlings=[CALL],
    events=[EventRow(id="e1", subject="order.made"), EventRow(id="e2", subject="order.made")],
    tasks=[TASK, TASK_2],
    effects=[
        Effect(kind="published", event="e1"),
        Effect(kind="published", event="e2"),
        DONE,
        DONE_2,
    ],
)
PUBLISHED = SOUND.effects[:2]


def broken(facts: Facts) -> set[str]:
    return {violation.invariant for violation in judge(facts)}


def test_sound_facts_pass():
    assert judge(SOUND) == []


def test_an_event_without_its_task_is_lost():
    facts = replace(SOUND, tasks=[TASK], effects=[*PUBLISHED, DONE])
    assert broken(facts) == {"I1 delivered once"}


def test_a_committed_event_that_is_gone_is_lost():
    event = SOUND.events[0]
    facts = replace(SOUND, events=[event], tasks=[TASK], effects=[PUBLISHED[0], DONE])
    assert "I1 delivered once" in broken(facts)
    assert "I8 commit or exception" in broken(facts), "half of the transaction is there"


def test_what_was_in_doubt_may_be_there_or_not():
    absent = Publication(events=frozenset({"e3"}), outcome=IN_DOUBT)
    killed = Publication(events=frozenset({"e4"}), outcome=None)
    assert judge(replace(SOUND, publications=[*SOUND.publications, absent, killed])) == []


def test_an_asynchronous_commit_may_be_lost_but_only_as_a_whole():
    nothing = replace(SOUND, events=[], tasks=[], effects=[])
    assert "I1 delivered once" in broken(nothing)
    assert judge(replace(nothing, is_durable=False)) == []
    half = replace(nothing, is_durable=False, effects=PUBLISHED[:1])
    assert broken(half) == {"I8 commit or exception"}


def test_two_tasks_of_one_event_are_one_too_many():
    assert "I1 delivered once" in broken(replace(SOUND, tasks=[TASK, TASK_2, TASK_2]))


def test_a_task_of_no_event_is_a_phantom():
    stray = replace(TASK, id=3, event="e9", state=CANCELLED, attempts=0)
    undone = Effect(kind="undone", event="e9", consumer="exact", epoch=1)
    facts = replace(SOUND, tasks=[*SOUND.tasks, stray], effects=[*SOUND.effects, undone])
    assert broken(facts) == {"I2 no phantoms"}


def test_a_transaction_that_was_rolled_back_leaves_nothing():
    facts = replace(
        SOUND, publications=[replace(SOUND.publications[0], outcome=ROLLED_BACK)], handlings=[]
    )
    assert broken(facts) == {"I8 commit or exception"}


@pytest.mark.parametrize(
    "effects",
    [
        [*PUBLISHED, DONE_2],
        [*PUBLISHED, DONE, DONE, DONE_2],
        [*PUBLISHED, replace(DONE, epoch=2), DONE_2],
    ],
    ids=["never", "twice", "by another lease"],
)
def test_an_effect_that_is_not_there_exactly_once_is_found(effects: list[Effect]):
    assert "I3 exactly-once effects" in broken(replace(SOUND, handlings=[], effects=effects))


def test_a_cancelled_task_has_been_undone_once_by_its_last_lease():
    cancelled = replace(TASK, state=CANCELLED, epoch=4, attempts=0)
    undone = Effect(kind="undone", event="e1", consumer="exact", epoch=4)
    facts = replace(SOUND, handlings=[], tasks=[cancelled, TASK_2])
    assert judge(replace(facts, effects=[*PUBLISHED, undone, DONE_2])) == []
    for wrong in ([], [undone, undone], [replace(undone, epoch=3)], [undone, DONE]):
        found = broken(replace(facts, effects=[*PUBLISHED, *wrong, DONE_2]))
        assert "I3 exactly-once effects" in found, wrong


def test_a_lost_lease_that_committed_is_found():
    facts = replace(SOUND, handlings=[replace(CALL, outcomes=frozenset({LOST}))])
    assert broken(facts) == {"I3 verdicts last"}


def test_a_task_that_never_ends_is_stuck():
    facts = replace(SOUND, handlings=[], tasks=[replace(TASK, state=2), TASK_2])
    facts = replace(facts, effects=[*PUBLISHED, DONE_2])
    assert broken(facts) == {"I4 nothing is stuck"}


def test_one_lease_with_two_holders_is_found():
    facts = replace(SOUND, handlings=[CALL, replace(CALL, who="w2", outcomes=frozenset())])
    assert broken(facts) == {"I5 one holder"}


def test_a_task_that_was_ended_twice_is_found():
    again = replace(CALL, epoch=2)
    facts = replace(SOUND, handlings=[CALL, again])
    assert "I5 one holder" in broken(facts)


def test_a_lease_that_ran_out_under_a_living_worker_counts_only_without_a_fault():
    late = replace(TASK, lost_leases=1, attempts=2, failures=1)
    facts = replace(SOUND, tasks=[late, TASK_2])
    assert judge(facts) == []
    assert broken(replace(facts, is_undisturbed=True)) == {"I5 leases are kept"}


def test_what_is_left_behind_is_found():
    assert broken(replace(SOUND, leftovers=["a connection"])) == {"I6 nothing is left"}


def test_a_failure_that_nobody_is_told_of_is_found():
    facts = replace(SOUND, tasks=[replace(TASK, attempts=2), TASK_2])
    assert broken(facts) == {"I7 failures are told"}


def test_a_task_that_was_cancelled_must_not_complete_unless_it_was_resumed():
    cancel = Operation(
        verb="cancel", consumer="exact", updated=frozenset({"e1"}), outcome=COMMITTED
    )
    assert broken(replace(SOUND, operations=[cancel])) == {"I8 operators are told"}
    assert judge(replace(SOUND, operations=[cancel], is_durable=False)) == []
    resume = replace(cancel, verb="resume")
    assert judge(replace(SOUND, operations=[cancel, resume])) == []


def test_effects_of_one_key_out_of_order_are_found():
    assert broken(replace(SOUND, effects=[*PUBLISHED, DONE_2, DONE])) == {"I9 strict order"}


def test_an_occurrence_that_was_published_twice_is_found():
    ticks = [
        EventRow(id=name, subject="tick.due", schedule="s", occurrence="noon") for name in "ab"
    ]
    facts = replace(SOUND, events=[*SOUND.events, *ticks])
    assert broken(facts) == {"I10 occurrences once"}


def test_history_tells_calls_that_ended_from_those_that_did_not(tmp_path: Path):
    written = History(tmp_path)
    first = written.begin("publish")
    written.note(first, events=["e1"])
    written.note(first, outcome=COMMITTED)
    written.begin("publish", events=["e2"])
    handled = written.begin("handle", consumer="exact", event="e1", task=1, epoch=1)
    written.note(handled, outcome="returned")
    written.note(handled, outcome=COMMITTED)
    operated = written.begin("operate", verb="cancel", consumer="exact")
    written.note(operated, updated=["e1"], outcome=COMMITTED)

    calls = history.read(tmp_path)

    assert list(history.publications(calls)) == [
        Publication(events=frozenset({"e1"}), outcome=COMMITTED),
        Publication(events=frozenset({"e2"}), outcome=None),
    ]
    (handling,) = history.handlings(calls)
    assert handling.who == written.who
    assert set(handling.outcomes) == {"returned", COMMITTED}
    (operation,) = history.operations(calls)
    assert operation.updated == {"e1"}


def test_every_line_of_a_history_stands_for_itself(tmp_path: Path):
    History(tmp_path).begin("publish", events=["e1"])
    (line,) = next(tmp_path.glob("*.jsonl")).read_text().splitlines()
    assert json.loads(line)["events"] == ["e1"]


def test_a_line_that_a_killed_process_has_not_finished_did_not_happen(tmp_path: Path):
    whole = '{"call": "1-1", "at": 1, "what": "publish", "events": ["a"]}\n'
    (tmp_path / "1.jsonl").write_text(whole + '{"call": "1-1", "at": 2, "outc')

    (publication,) = history.publications(history.read(tmp_path))

    assert publication.outcome is None
