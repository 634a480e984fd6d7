from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanthorq_django.domain.retry import (
    ATTEMPT_LIMIT,
    WAIT_LIMIT,
    Exponential,
    Fixed,
    Never,
    Polynomial,
    RetryPolicy,
)

SECOND = timedelta(seconds=1)
POLICIES = [
    Polynomial(),
    Polynomial(degree=0),
    Polynomial(degree=1.5, base=timedelta(microseconds=1)),
    Polynomial(degree=500),
    Polynomial(degree=float("inf")),
    Exponential(),
    Exponential(factor=1),
    Exponential(factor=1e300, base=timedelta(days=1)),
    Exponential(factor=float("inf")),
    Fixed(),
    Fixed(timedelta(0), jitter=1),
    Fixed(WAIT_LIMIT, jitter=1),
    Never(),
]


def test_the_default_waits_the_fourth_power_of_the_attempt_in_seconds() -> None:
    waits = [Polynomial().next_delay(attempt, chance=0.5) for attempt in (1, 2, 3, 4)]
    assert waits == [SECOND, 16 * SECOND, 81 * SECOND, 256 * SECOND]


def test_jitter_spreads_the_default_from_90_to_110_percent() -> None:
    policy = Polynomial()
    assert policy.next_delay(2, chance=0) == timedelta(seconds=14.4)
    assert policy.next_delay(2, chance=0.25) == timedelta(seconds=15.2)
    assert policy.next_delay(2, chance=1) == timedelta(seconds=17.6)


def test_an_exponential_wait_doubles_up_to_its_longest() -> None:
    policy = Exponential(base=2 * SECOND, longest=10 * SECOND, jitter=0)
    assert [policy.next_delay(attempt) for attempt in (1, 2, 3, 4, 5)] == [
        2 * SECOND,
        4 * SECOND,
        8 * SECOND,
        10 * SECOND,
        10 * SECOND,
    ]


def test_a_fixed_wait_is_the_same_after_every_attempt() -> None:
    policy = Fixed(timedelta(seconds=7))
    assert {policy.next_delay(attempt) for attempt in (1, 2, ATTEMPT_LIMIT)} == {7 * SECOND}


def test_a_fixed_wait_of_a_week_is_not_cut_to_a_day() -> None:
    assert Fixed(timedelta(days=7)).next_delay(1) == timedelta(days=7)


def test_never_allows_one_attempt() -> None:
    assert Never().attempt_max == 1
    assert Never().next_delay(1) == timedelta(0)


@pytest.mark.parametrize("attempt_max", [None, 2])
def test_never_takes_no_other_number_of_attempts(attempt_max: int | None) -> None:
    with pytest.raises(ValueError, match="use Fixed"):
        Never(attempt_max=attempt_max)


def test_a_policy_leaves_the_number_of_attempts_to_the_consumer_unless_told() -> None:
    assert Polynomial().attempt_max is None
    assert Exponential(attempt_max=10).attempt_max == 10
    assert Fixed(attempt_max=ATTEMPT_LIMIT).attempt_max == 32_767


def test_jitter_never_leads_above_the_longest_wait() -> None:
    policy = Polynomial(longest=timedelta(seconds=16), jitter=0.5)
    assert policy.next_delay(2, chance=1) == timedelta(seconds=16)
    assert policy.next_delay(2, chance=0) == timedelta(seconds=8)


def test_what_waits_longest_does_not_come_back_together_either() -> None:
    policy = Exponential(longest=timedelta(seconds=10), jitter=0.5)
    waits = [policy.next_delay(50, chance=chance) for chance in (0, 0.5, 1)]
    assert waits == [5 * SECOND, 7.5 * SECOND, 10 * SECOND]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("attempt", [1, 2, 16, 1_000, ATTEMPT_LIMIT, 10**9])
def test_no_attempt_overflows(policy: RetryPolicy, attempt: int) -> None:
    for chance in (0, 0.5, 1, None):
        assert timedelta(0) <= policy.next_delay(attempt, chance=chance) <= policy.longest


@settings(deadline=None, database=None)
@given(
    policy=st.builds(
        Exponential,
        base=st.timedeltas(timedelta(microseconds=1), timedelta(days=1)),
        factor=st.floats(1, 1e6),
        jitter=st.floats(0, 1),
    ),
    attempt=st.integers(1, ATTEMPT_LIMIT),
    chance=st.floats(0, 1),
)
def test_a_drawn_wait_lies_within_its_jitter(
    policy: Exponential, attempt: int, chance: float
) -> None:
    wait = policy.next_delay(attempt, chance=chance)
    try:
        planned = policy.wait(attempt)
    except OverflowError:
        planned = policy.longest
    rounding = timedelta(microseconds=1) + planned * 1e-9 if planned < WAIT_LIMIT else timedelta(0)
    assert min(planned, policy.longest) * (1 - policy.jitter) - rounding <= wait
    assert wait <= policy.longest


def test_chance_is_drawn_anew_for_every_wait() -> None:
    policy = Fixed(timedelta(days=1), jitter=1, longest=timedelta(days=2))
    assert len({policy.next_delay(1) for _ in range(20)}) > 1


@pytest.mark.parametrize("attempt", [0, -1])
def test_attempts_count_from_one(attempt: int) -> None:
    with pytest.raises(ValueError, match="counts from 1"):
        Polynomial().next_delay(attempt)


@pytest.mark.parametrize(
    ("policy", "options", "problem"),
    [
        (Polynomial, {"attempt_max": 0}, "attempt_max"),
        (Polynomial, {"attempt_max": -1}, "attempt_max"),
        (Polynomial, {"attempt_max": ATTEMPT_LIMIT + 1}, "attempt_max must be 1 to 32767"),
        (Polynomial, {"attempt_max": True}, "attempt_max"),
        (Polynomial, {"attempt_max": 1.5}, "attempt_max"),
        (Polynomial, {"attempt_max": "3"}, "attempt_max"),
        (Polynomial, {"jitter": -0.1}, "jitter"),
        (Polynomial, {"jitter": 1.1}, "jitter"),
        (Polynomial, {"jitter": float("nan")}, "jitter"),
        (Polynomial, {"longest": timedelta(0)}, "longest"),
        (Polynomial, {"longest": 60}, "longest"),
        (Polynomial, {"longest": timedelta.max}, "longest must be .* 3650 days"),
        (Polynomial, {"base": timedelta(0)}, "base"),
        (Polynomial, {"base": 1}, "base"),
        (Polynomial, {"degree": -1}, "degree"),
        (Polynomial, {"degree": float("nan")}, "degree"),
        (Exponential, {"base": -SECOND}, "base"),
        (Exponential, {"factor": 0.5}, "factor"),
        (Exponential, {"factor": float("nan")}, "factor"),
        (Fixed, {"delay": -SECOND}, "delay"),
        (Fixed, {"delay": 30}, "delay"),
        (Fixed, {"delay": timedelta.max}, "delay"),
        (Fixed, {"delay": timedelta(days=2), "longest": timedelta(days=1)}, "delay is 2 days"),
    ],
)
def test_a_field_out_of_its_range_is_named(
    policy: type[RetryPolicy], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        policy(**options)


def test_a_policy_of_ones_own_needs_a_wait() -> None:
    class Weekly(RetryPolicy):
        def wait(self, attempt: int) -> timedelta:
            return timedelta(weeks=attempt)

    assert Weekly(jitter=0, longest=WAIT_LIMIT).next_delay(2) == timedelta(weeks=2)
    with pytest.raises(TypeError, match="abstract"):
        RetryPolicy()  # type: ignore[abstract]  # that is the point


@pytest.mark.parametrize("waited", [5, 1.5, None, "an hour"])
def test_a_policy_of_ones_own_that_returns_no_timedelta_is_told(waited: Any) -> None:
    class Weekly(RetryPolicy):
        def wait(self, attempt: int) -> timedelta:
            return waited  # type: ignore[no-any-return]  # that is the point

    problem = rf"Weekly\.wait\(2\) must return a timedelta, not {waited!r}"
    with pytest.raises(TypeError, match=problem):
        Weekly().next_delay(2)
