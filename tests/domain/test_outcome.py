from dataclasses import FrozenInstanceError
from uuid import uuid4

import pytest

from kanthorq_django.domain.outcome import Outcome

ONE, TWO, THREE, FOUR = (uuid4() for _ in range(4))


def test_outcomes_add_up_group_by_group_and_in_order() -> None:
    total = Outcome((ONE,), (TWO,), ()) + Outcome((THREE,), (), (FOUR,))
    assert total == Outcome(updated=(ONE, THREE), requested=(TWO,), noop=(FOUR,))


def test_an_empty_outcome_changes_no_sum() -> None:
    outcome = Outcome((ONE,), (TWO,), (THREE,))
    assert Outcome() + outcome == outcome + Outcome() == outcome


def test_an_outcome_is_a_value_that_nobody_changes() -> None:
    outcome = Outcome((ONE,))
    with pytest.raises(FrozenInstanceError):
        outcome.updated = ()  # type: ignore[misc]  # that is the point
