import re

import pytest

from kanthorq_django.domain.names import NAME_SIZE_MAX, name_problem, similar_names


@pytest.mark.parametrize(
    "name", ["a", "7", "orders", "shop.refund-2", "a:b_c", "A" * NAME_SIZE_MAX]
)
def test_a_name_is_letters_digits_and_a_few_marks(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "start with a letter or digit of ASCII"),
        ("_a", "start with"),
        (".a", "start with"),
        ("a b", "go on with"),
        ("a\n", "go on with"),
        ("a\x00", "go on with"),
        ("a\ud800", "go on with"),
        ("ä", "start with"),
        ("a/b", "go on with"),
        ("a'; --", "go on with"),
        ("a" * (NAME_SIZE_MAX + 1), "129 characters, the limit is 128"),
        (None, "a str, not NoneType"),
        (5, "a str, not int"),
    ],
)
def test_what_cannot_be_a_name_is_explained(name: object, problem: str) -> None:
    assert re.search(problem, str(name_problem(name)))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("refnds", ["refunds"]),
        ("hoper", ["hopper"]),
        ("nope", []),
        ("", []),
    ],
)
def test_a_name_is_near_another_when_a_slip_leads_there(name: str, near: list[str]) -> None:
    assert similar_names(name, ["hopper", "refunds"]) == near
