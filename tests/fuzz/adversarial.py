"""Strategies of values that nobody means to send, for every door alike."""

import math
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.fuzz.reader import PIECES, Unreadable, nested

# The run in CI is small; FUZZ_FACTOR=100 makes every test a hundred times as long.
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
SECONDS_MAX = 20  # of one example, on a machine with other work to do

ZONES = (None, UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=12)))

characters = st.characters(exclude_categories=())  # halves of surrogate pairs, too
texts = st.lists(st.sampled_from(PIECES) | st.text(characters, max_size=6), max_size=4).map("".join)
# What an HTTP request or a command line can carry.
typed = texts.map(lambda text: text.replace("\x00", "").encode("utf-8", "replace").decode())
sizes = st.sampled_from((1, 127, 128, 129, 255, 256, 300, 5_000)).map(lambda size: "x" * size)
names = texts | sizes | st.from_regex(r"\A[a-z][a-z0-9.:_-]{0,8}\Z")
subjects = names | st.lists(texts, min_size=1, max_size=4).map(".".join)
numbers = (
    st.integers()
    # Hypothesis prints what it tries; integers that cannot be printed are the guided targets'.
    | st.sampled_from((2**15, 2**31, 2**53 + 1, 2**63, 10**400, 10**4_299, -(10**4_299)))
    | st.floats()
    | st.sampled_from((1e16, 1e23, 1e308, 5e-324, -0.0, math.nan, math.inf))
)
moments = st.datetimes(timezones=st.sampled_from(ZONES)) | st.sampled_from(
    [edge.replace(tzinfo=zone) for edge in (datetime.min, datetime.max) for zone in ZONES]  # noqa: DTZ901
)
durations = (
    st.timedeltas(timedelta(0), timedelta(days=4_000))
    | st.timedeltas(timedelta(0), timedelta(days=1))
    | st.sampled_from((timedelta.max, timedelta.min, timedelta(0)))
)
leaves = st.none() | st.booleans() | numbers | texts
json_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts | leaves, inner, max_size=3)
        | st.builds(nested, inner, st.integers(0, 600))
    ),
    max_leaves=8,
)
odd = st.sampled_from(
    (object(), Unreadable(), {1}, b"x", 1j, ..., len, Decimal("NaN"), date(1, 1, 1), UUID(int=0))
)
anything: st.SearchStrategy[Any] = json_values | moments | durations | odd | st.binary(max_size=20)


def mostly(value: Any, other: st.SearchStrategy[Any] = anything) -> st.SearchStrategy[Any]:
    """Return a strategy of ``value`` three times out of four, so that not everything is wrong."""
    return st.sampled_from((0, 1, 2, 3)).flatmap(
        lambda roll: other if roll == 3 else st.just(value)
    )


def examples(count: int) -> Callable[[Any], Any]:
    """Run a test on so many examples, each within its time."""
    return settings(
        max_examples=count * FACTOR,
        deadline=timedelta(seconds=SECONDS_MAX),
        database=None,
        # One test's rows serve all of its examples: each takes back, or counts, what it writes.
        suppress_health_check=list(HealthCheck),
    )


def few_odd(
    usual: dict[str, Any], odd: dict[str, st.SearchStrategy[Any]], most: int = 2
) -> st.SearchStrategy[dict[str, Any]]:
    """Return ``usual`` with up to ``most`` of its values replaced by ``odd`` ones."""
    chosen = st.lists(st.sampled_from(sorted(odd)), max_size=most, unique=True)
    return chosen.flatmap(
        lambda keys: st.fixed_dictionaries({key: odd[key] for key in keys}).map(
            lambda given: usual | given
        )
    )
