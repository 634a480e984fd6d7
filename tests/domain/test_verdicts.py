import copy
import pickle
from datetime import timedelta
from typing import Any

import pytest

from kanthorq_django.domain.verdicts import Discard, Retry, Snooze, Verdict

HOUR = timedelta(hours=1)


def test_a_retry_carries_its_delay_and_reason() -> None:
    verdict = Retry(HOUR, "The bank is closed.")
    assert (verdict.after, verdict.reason, str(verdict)) == (HOUR, *2 * ["The bank is closed."])


def test_a_snooze_says_for_how_long() -> None:
    verdict = Snooze(HOUR)
    assert (verdict.delay, str(verdict)) == (HOUR, "Snoozed for 1:00:00.")


def test_a_discard_carries_its_reason() -> None:
    assert Discard("Unknown order.").reason == "Unknown order."
    assert Discard().reason


def test_every_verdict_can_be_caught_as_one() -> None:
    assert all(issubclass(verdict, Verdict) for verdict in (Retry, Snooze, Discard))


@pytest.mark.parametrize("delay", [-HOUR, timedelta.max, 60, None, "1h", True])
@pytest.mark.parametrize("verdict", [Retry, Snooze])
def test_a_delay_is_a_timedelta_between_now_and_ten_years(
    verdict: type[Retry | Snooze], delay: timedelta
) -> None:
    with pytest.raises(ValueError, match="must be a timedelta from zero to 3650 days"):
        verdict(delay)


@pytest.mark.parametrize("delay", [timedelta(0), timedelta(days=3_650)])
@pytest.mark.parametrize("verdict", [Retry, Snooze])
def test_the_edges_of_a_delay_are_allowed(verdict: type[Retry | Snooze], delay: timedelta) -> None:
    verdict(delay)


@pytest.mark.parametrize(
    "verdict", [Retry(HOUR, "busy"), Retry(HOUR), Snooze(HOUR), Discard("never")]
)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda verdict: pickle.loads(pickle.dumps(verdict))],  # noqa: S301  # our own
)
def test_verdicts_can_be_copied_and_sent_from_another_process(verdict: Any, copied: Any) -> None:
    made = copied(verdict)
    assert type(made) is type(verdict)
    assert (str(made), vars(made)) == (str(verdict), vars(verdict))
