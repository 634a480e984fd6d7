"""Waiting as long as there is hope."""

import itertools

import pytest

from project.shop import patience
from project.shop.patience import NothingHappens, wait_until


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOOK_EVERY", 0.001)
    monkeypatch.setattr(patience, "ASK_EVERY", 0.002)
    monkeypatch.setattr(patience, "LONGEST", 0.05)


def test_waiting_goes_on_for_as_long_as_there_is_progress():
    looks = itertools.count()
    wait_until(lambda: next(looks) == 200, itertools.count().__next__)
    assert next(looks) == 201


def test_waiting_ends_when_nothing_happens():
    with pytest.raises(NothingHappens, match="Nothing has moved"):
        wait_until(lambda: False, lambda: "as before")
