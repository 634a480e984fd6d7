"""Every target of ``make fuzz``, unguided: so that none of them rots, and each fault is found."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django.domain.subscriptions import Registry
from tests.fuzz.adversarial import examples
from tests.fuzz.guided import main
from tests.fuzz.oracle import assert_sentence
from tests.fuzz.reader import Reader
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
@examples(40)
@given(data=st.binary(min_size=20, max_size=400))
def test_no_bytes_make_a_target_fail(declared: Registry, name: str, data: bytes):
    TARGETS[name](Reader(data))


def test_a_finding_is_replayed_from_its_bytes():
    assert main(["--replay", "rules", "00ff"]) == 0


@pytest.mark.parametrize("text", ["", " \t", "two\nlines", "\x1b[31mred", "\u202e", "x" * 701])
def test_an_error_that_is_no_sentence_is_found(text: str):
    with pytest.raises(AssertionError):
        assert_sentence(ValueError(text))


def test_the_same_bytes_are_the_same_values():
    first, second = Reader(b"\x03\x07abc" * 20), Reader(b"\x03\x07abc" * 20)
    assert [first.text(), first.whole(), first.duration()] == [
        second.text(),
        second.whole(),
        second.duration(),
    ]
    assert isinstance(Reader(b"").duration(), timedelta)
