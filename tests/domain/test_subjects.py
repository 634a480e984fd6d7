import re
import unicodedata

import pytest

from kanthorq_django.domain.subjects import (
    SUBJECT_SIZE_MAX,
    filter_problem,
    matches,
    selects,
    subject_problem,
    to_regex,
)

LONGEST = "a" * SUBJECT_SIZE_MAX


@pytest.mark.parametrize(
    "subject",
    [
        "a",
        "order",
        "order.cancelled.v2",
        "Bestellung.gelöscht",
        "注文.取消",
        "order.🛒",
        "a-b_c:d/e@f",
        "100%.(a+)+$.\\d",
        unicodedata.normalize("NFC", "cafe\u0301.x"),
        "a.\u0301b",  # a token may begin with a combining character that composes with nothing
        LONGEST,
        ".".join("a" * 128),
    ],
)
def test_a_subject_is_printable_tokens_joined_by_dots(subject: str) -> None:
    assert subject_problem(subject) is None
    assert filter_problem(subject) is None


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ("", "empty"),
        (".", "empty token"),
        (".a", "empty token"),
        ("a.", "empty token"),
        ("a..b", "empty token"),
        (" ", "space"),
        ("a b", "space"),
        (" a", "space"),
        ("a\tb", r"'\\t' is not printable"),
        ("a\nb", r"'\\n' is not printable"),
        ("a\x00b", r"'\\x00' is not printable"),
        ("a\x1bb", "not printable"),
        ("a\x7fb", "not printable"),
        ("a\x85b", "not printable"),
        ("a\xa0b", "not printable"),  # no-break space
        ("a\u2003b", "not printable"),  # em space
        ("a\u2028b", "not printable"),  # line separator
        ("a\u200bb", "not printable"),  # zero width space
        ("a\u200db", "not printable"),  # zero width joiner
        ("a\u202eb", "not printable"),  # right-to-left override
        ("\ufeffa", "not printable"),  # byte order mark
        ("a\ud800b", r"'\\ud800' is not printable"),
        ("cafe\u0301", "NFC"),
        ("\u212b", "NFC"),  # the angstrom sign is not the letter it looks like
        (LONGEST + "a", "256 bytes of UTF-8, the limit is 255"),
        ("ä" * 128, "256 bytes"),
        ("a" * 10_000, "10000 bytes"),
        (None, "a str, not NoneType"),
        (7, "a str, not int"),
        (b"order", "a str, not bytes"),
        (["order"], "a str, not list"),
    ],
)
def test_what_breaks_the_grammar_is_named(subject: object, problem: str) -> None:
    assert re.search(problem, str(subject_problem(subject)))
    assert re.search(problem, str(filter_problem(subject)))


@pytest.mark.parametrize("subject", ["*", ">", "a.*", "a.>", "a.*.b", "a*", "a.b>", "**"])
def test_a_wildcard_is_refused_in_a_subject(subject: str) -> None:
    assert "wildcard" in str(subject_problem(subject))


@pytest.mark.parametrize("pattern", ["*", ">", "a.*", "*.a", "*.*", "a.>", "*.>", "a.*.b.>"])
def test_a_filter_takes_wildcards_as_whole_tokens(pattern: str) -> None:
    assert filter_problem(pattern) is None


@pytest.mark.parametrize("pattern", ["a.**", "a*", "*a.b", "a.b>", ">>", "a.>b", "*>"])
def test_a_filter_refuses_a_wildcard_inside_a_token(pattern: str) -> None:
    assert "whole tokens" in str(filter_problem(pattern))


@pytest.mark.parametrize("pattern", [">.a", "a.>.b", ">.>", ">.*"])
def test_a_filter_takes_the_open_end_last_only(pattern: str) -> None:
    assert filter_problem(pattern) == "'>' may only stand last"


@pytest.mark.parametrize(
    ("pattern", "subject"),
    [
        ("order.cancelled", "order.cancelled"),
        ("*", "order"),
        ("order.*", "order.cancelled"),
        ("*.cancelled", "order.cancelled"),
        ("order.*.v2", "order.cancelled.v2"),
        (">", "order"),
        (">", "order.cancelled.v2"),
        ("order.>", "order.cancelled"),
        ("order.>", "order.cancelled.v2"),
        ("*.>", "order.cancelled.v2"),
        ("a.%._", "a.%._"),
        ("(a+)+$", "(a+)+$"),
    ],
)
def test_a_filter_selects(pattern: str, subject: str) -> None:
    assert matches(pattern, subject)


@pytest.mark.parametrize(
    ("pattern", "subject"),
    [
        ("order", "orders"),
        ("order", "Order"),
        ("order", "order.cancelled"),
        ("order.cancelled", "order"),
        ("*", "order.cancelled"),
        ("order.*", "order"),
        ("order.*", "order.cancelled.v2"),
        ("order.>", "order"),
        ("*.*.>", "order.cancelled"),
        ("a.%", "a.b"),
        ("a._", "a.b"),
        ("a+", "aa"),
        ("[ab]", "a"),
    ],
)
def test_a_filter_leaves_alone(pattern: str, subject: str) -> None:
    assert not matches(pattern, subject)


def test_an_excluded_subject_is_not_selected_however_often_it_is_included() -> None:
    includes, excludes = ["order.>", "*.paid"], ["order.internal.>", "*.*.draft", "order.secret"]
    assert selects(includes, excludes, "order.paid")
    assert selects(includes, excludes, "invoice.paid")
    assert not selects(includes, excludes, "order.internal.note")
    assert not selects(includes, excludes, "order.paid.draft")
    assert not selects(includes, excludes, "order.secret")
    assert not selects(includes, excludes, "invoice.sent")


def test_there_may_be_more_excludes_than_includes_and_fewer() -> None:
    assert not selects([">"], ["a", "b", "c"], "c")
    assert not selects(["a", "b", "c"], ["c"], "c")
    assert selects(["a", "b", "c"], ["c"], "b")


def test_nothing_is_selected_without_an_include() -> None:
    assert not selects([], [], "order")


def test_a_regular_expression_has_every_character_escaped_that_could_mean_more() -> None:
    assert to_regex(["a.(b+)*"]) == r"^(?:a\.\(b\+\)\*)$"
    assert to_regex(["*.b", "c.>"]) == r"^(?:[^.]+\.b|c\..+)$"
