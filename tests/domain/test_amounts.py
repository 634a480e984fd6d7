import pytest

from kanthorq_django.domain.amounts import counted, listed, plural


@pytest.mark.parametrize(("count", "word"), [(0, "tasks"), (1, "task"), (2, "tasks")])
def test_only_one_is_singular(count: int, word: str) -> None:
    assert plural(count, "task") == word


def test_a_plural_of_its_own_is_given() -> None:
    assert [plural(count, "body", "bodies") for count in (1, 2)] == ["body", "bodies"]


def test_thousands_are_separated() -> None:
    assert [counted(count, "task") for count in (0, 1, 2_000)] == [
        "0 tasks",
        "1 task",
        "2,000 tasks",
    ]


@pytest.mark.parametrize(
    ("names", "count", "text"),
    [
        ("", None, ""),
        ("a", None, "a"),
        ("abc", None, "a, b, c"),
        ("abcd", None, "a, b, c and 1 other"),
        ("abcdefg", None, "a, b, c and 4 others"),
        ("ab", 1_002, "a, b and 1,000 others"),
    ],
)
def test_the_first_names_stand_for_all(names: str, count: int | None, text: str) -> None:
    assert listed(names, shown_max=3, count=count) == text
