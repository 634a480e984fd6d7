"""The checker can fail: with a mechanism taken out, its own invariant breaks.

And without any fault the whole workload passes, of which it is the other half of the proof.
"""

import os
import signal

import pytest

from tests.faults.invariants import Violation
from tests.faults.stage import Stage
from tests.quick_run import sooner

SINCE = "attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz"
FENCE = [
    ["AND lease_epoch = %(lease_epoch)s", ""],
    [f"AND {SINCE} + %(since)s::bigint * interval '1 microsecond'", ""],
]
FENCE_OF_MANY = [
    ["USING (id, lease_epoch)", "USING (id)"],
    [f"AND task.{SINCE} + verdict.since * interval '1 microsecond'", ""],
]
FENCE_OF_A_GROUP = [
    ["AND task.lease_epoch = (%(epochs)s::bigint[])[place]", ""],
    [f"AND task.{SINCE} + (%(since)s::bigint[])[place] * interval '1 microsecond'", ""],
]
WITHOUT_A_FENCE = {
    "ack": FENCE_OF_MANY,
    "ack_group": FENCE_OF_A_GROUP,
    "ack_one": FENCE,
    "ack_last": FENCE,
}
LAST_READ = """coalesce(
    (
        SELECT event_id FROM kanthorq_django_task
        WHERE consumer_id = %(consumer_id)s ORDER BY event_id DESC LIMIT 1
    ), '00000000-0000-0000-0000-000000000000'::uuid
)"""
BY_POSITION = {
    "pull": [
        ["WHERE pg_visible_in_snapshot(open.xid, reader.horizon)", "WHERE false"],
        ["AND (xid, id) > (", f"AND id > {LAST_READ} AND ('9223372036854775807'::xid8, id) > ("],
    ]
}
WAITING_RENEWAL = {
    "renew": [["FOR NO KEY UPDATE OF task SKIP LOCKED", "FOR NO KEY UPDATE OF task"]]
}


def broken(violations: list[Violation]) -> set[str]:
    return {violation.invariant for violation in violations}


def test_the_workload_passes_when_nothing_happens_to_it(stage: Stage):
    stage.is_undisturbed = True
    stage.consumers.append("ticks")
    stage.worker()
    client = stage.client()
    stage.wait_until_started()  # else nothing runs yet that an operator could stop
    client.do("both 60")
    client.do("tick 20")
    while not stage.view.value(CANCELLATIONS):  # workers are quick: chance may leave none
        client.do("both 20")
    stage.settle()

    facts = stage.check()

    assert len(facts.tasks) > 200
    assert {task.state for task in facts.tasks} >= {101}
    assert any(handling.verb == "cancel" for handling in facts.handlings)


def let_two_hold_one_task(stage: Stage, sql: dict[str, list[list[str]]]) -> None:
    """Freeze a worker past its lease, and let it end its task while its successor is at it."""
    stage.consumers = ["gated"]
    frozen = stage.worker(sql=sql)
    stage.client().do(f"say gate.one {stage.folder}")
    stage.wait_until(lambda: stage.view.value(HOLDING) == 1)
    os.killpg(frozen.pid, signal.SIGSTOP)
    stage.worker(sql=sql)
    stage.wait_until(lambda: stage.view.value(HOLDING) == 2)
    (stage.folder / "1").touch()
    os.killpg(frozen.pid, signal.SIGCONT)
    stage.wait_until(lambda: stage.view.value(HOLDING) == 1)
    (stage.folder / "2").touch()
    stage.settle()


CANCELLATIONS = "SELECT count(*) FROM kanthorq_django_task WHERE cancel_attempt_count > 0"
RUNNING = "SELECT count(*) FROM kanthorq_django_task WHERE state = 2"
# A handler that has written and not committed.
HOLDING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'idle in transaction'
        AND query LIKE 'INSERT INTO "ledger_entry"%'
"""


@pytest.mark.parametrize("fence", sooner(["there", "gone"], "gone"))
def test_without_the_fence_a_late_worker_commits_once_more(stage: Stage, fence: str):
    let_two_hold_one_task(stage, WITHOUT_A_FENCE if fence == "gone" else {})

    found = broken(stage.violations())

    assert found == ({"I3 exactly-once effects"} if fence == "gone" else set())


@pytest.mark.parametrize("cursor", sooner(["a snapshot", "a position"], "a position"))
def test_a_position_as_the_cursor_skips_what_commits_late(stage: Stage, cursor: str):
    stage.consumers = ["atomic", "plain"]
    stage.worker(sql=BY_POSITION if cursor == "a position" else {})
    client = stage.client()
    client.do("publish 10")
    client.do("straddle")
    if cursor == "a position":
        with pytest.raises(AssertionError, match="Waited in vain"):
            stage.settle(3)
        assert broken(stage.violations()) == {"I1 delivered once"}
    else:
        stage.settle()
        stage.check()


@pytest.mark.parametrize("renewal", sooner(["skips", "waits"], "waits"))
def test_a_renewal_that_waits_for_locked_rows_lets_other_leases_run_out(stage: Stage, renewal: str):
    stage.is_undisturbed = True
    stage.consumers = ["lingering", "slow"]
    stage.worker(sql=WAITING_RENEWAL if renewal == "waits" else {})
    client = stage.client()
    client.do("say linger.on")
    stage.wait_until(lambda: stage.view.value(RUNNING) == 1)
    client.do("say slow.on")  # the younger one: rows are locked in the order of their ids
    stage.wait_until(lambda: stage.view.value(RUNNING) == 2)
    stage.worker()
    stage.settle()

    found = broken(stage.violations())

    assert found == ({"I5 leases are kept"} if renewal == "waits" else set())
