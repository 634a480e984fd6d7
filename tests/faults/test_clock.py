"""Machines whose clocks are wrong: only the database's clock decides."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.stage import Stage
from tests.quick_run import sooner

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


def wrong_by(offset: str) -> dict[str, Any]:
    """Return the variables under which a process takes the time to be another one."""
    if not LIBRARIES:
        pytest.skip("there is no libfaketime; apt-get install libfaketime")
    return {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def test_workers_whose_clocks_are_ten_minutes_wrong_keep_and_lose_leases_as_others(stage: Stage):
    stage.is_undisturbed = True
    stage.consumers += ["slow", "ticks"]
    stage.worker(**wrong_by("+600s"))
    stage.worker(**wrong_by("-600s"))
    client = stage.client()
    stage.wait_until_started()
    client.do("say slow.on")
    client.do("tick 10")
    client.do("both 30")

    stage.settle()

    stage.check()


@pytest.mark.parametrize("offset", sooner(["+600s", "-600s"], "-600s"))
def test_publishers_whose_clock_is_ten_minutes_wrong_lose_nothing(stage: Stage, offset: str):
    """The ids of their events are of another time; delivery does not go by them."""
    stage.worker()
    wrong, right = stage.client(**wrong_by(offset)), stage.client()
    stage.wait_until_started()
    for _ in range(3):
        wrong.begin("say order.wrong")
        right.do("publish 6")
        wrong.wait()

    stage.settle()

    stage.check()


@pytest.mark.slow
def test_a_clock_that_jumps_by_ten_minutes_and_back_ends_no_lease(stage: Stage):
    stage.is_undisturbed = True
    stage.consumers += ["slow", "ticks"]
    clock = stage.folder / "clock"
    clock.write_text("+0s\n")
    given = wrong_by("") | {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    del given["FAKETIME"]  # it would win over the file
    stage.worker(**given)
    client = stage.client()
    stage.wait_until_started()
    for offset in ("+600s", "+0s"):
        client.do("say slow.on")
        client.begin("both 20")
        clock.write_text(f"{offset}\n")
        client.wait()

    stage.settle()

    stage.check()
