"""Three matchers of subjects agree: Python's, PostgreSQL's, and a naive one written here."""

import re
import unicodedata

import pytest
from django.db import connection
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kanthorq_django import publish_many
from kanthorq_django.domain.subjects import (
    SUBJECT_SIZE_MAX,
    filter_problem,
    filters_problem,
    selects,
    subject_problem,
    to_regex,
)
from kanthorq_django.models import Event
from tests.factories import ConsumerFactory, StreamFactory

# Few tokens, so that filters often match, and all that means something to a regular
# expression, to LIKE, to SQL, to psycopg or to Unicode.
TOKENS = [
    *("a", "b", "A", "aa", "0", "order", "\\", "\\d", "\\b", "\\Z", "^", "$", "^a$", "(", ")"),
    *("[a]", "[^", "{1}", "|", "a|b", "?", "+", "(a+)+$", "(?i)a", "(?#", "=~", "%"),
    *("%s", "%%", "%(a)s", "_", "'", '"', "''", ";--", "$$", "{}", "a\\", "ä", "Ä", "ß", "\u017f"),
    *(
        "İ",
        "\u0131",
        "ﬁ",
        "é",
        "\u0301",
        "e\u0302\u0327",
        "注文",
        "🛒",
        "\U0001f468",
        "\U0001d518",
        "٣",
        "א",
    ),
]
TOKENS = [unicodedata.normalize("NFC", token) for token in TOKENS]
PRINTABLE = st.characters(exclude_categories=["C", "Z"], exclude_characters=".*>")

tokens = st.sampled_from(TOKENS) | st.text(PRINTABLE, min_size=1, max_size=4)
subjects = (
    st.lists(tokens, min_size=1, max_size=5)
    .map(lambda parts: unicodedata.normalize("NFC", ".".join(parts)))
    .filter(lambda subject: subject_problem(subject) is None)
)


@st.composite
def filters_near(draw: st.DrawFn, subject: str) -> str:
    """A filter that selects ``subject``, or just fails to."""
    parts = [draw(st.sampled_from([part, part, "*", "a"])) for part in subject.split(".")]
    end = draw(st.sampled_from(["", "", "cut", "more", ">", "replace"]))
    if end in ("cut", "replace") and len(parts) > 1:
        parts.pop()
    if end in (">", "replace"):
        parts.append(">")
    if end == "more":
        parts.append(draw(st.sampled_from(["*", "a"])))
    return ".".join(parts)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], list[str], list[str]]:
    """Subjects, and includes and excludes that were made from some of them."""
    given_subjects = draw(st.lists(subjects, min_size=1, max_size=12))
    near = st.sampled_from(given_subjects).flatmap(filters_near)
    near = near.filter(lambda pattern: filter_problem(pattern) is None)
    includes = draw(st.lists(near, max_size=5))
    return given_subjects, includes, draw(st.lists(near, max_size=3))


def naive_match(pattern: list[str], subject: list[str]) -> bool:
    if not pattern or not subject:
        return not pattern and not subject
    if pattern == [">"]:
        return True
    return pattern[0] in ("*", subject[0]) and naive_match(pattern[1:], subject[1:])


def naive_selects(includes: list[str], excludes: list[str], subject: str) -> bool:
    def any_of(patterns: list[str]) -> bool:
        return any(naive_match(pattern.split("."), subject.split(".")) for pattern in patterns)

    return any_of(includes) and not any_of(excludes)


def selected_by_postgresql(
    includes: list[str], excludes: list[str], given_subjects: list[str]
) -> list[bool]:
    """Match as the pull does."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT subject ~ %s AND subject !~ %s"
            " FROM unnest(%s::varchar[]) WITH ORDINALITY AS given (subject, position)"
            " ORDER BY position",
            [to_regex(includes), to_regex(excludes), given_subjects],
        )
        return [row[0] for row in cursor.fetchall()]


def assert_all_agree(includes: list[str], excludes: list[str], given_subjects: list[str]) -> None:
    naive = [naive_selects(includes, excludes, subject) for subject in given_subjects]
    assert [selects(includes, excludes, subject) for subject in given_subjects] == naive
    assert selected_by_postgresql(includes, excludes, given_subjects) == naive


@pytest.mark.django_db
@settings(max_examples=300, deadline=None, database=None)
@given(cases())
@example((["a.b"], [], []))
@example((["a.b", "a"], [">"], ["a"]))
@example((["a.b", "a.c", "b"], ["*.b", "b"], []))
def test_python_and_postgresql_select_what_a_naive_matcher_selects(
    case: tuple[list[str], list[str], list[str]],
) -> None:
    given_subjects, includes, excludes = case
    assert_all_agree(includes, excludes, given_subjects)


@pytest.mark.django_db
def test_every_awkward_token_matches_itself_alone() -> None:
    for token in TOKENS:
        assert_all_agree([token], [], TOKENS)
        assert selects([token], [], token)


@pytest.mark.django_db
def test_matchers_agree_at_the_limit_of_255_bytes() -> None:
    longest = ["a" * SUBJECT_SIZE_MAX, "ä" * 127 + "a", ".".join("a" * 128), "!" * 255]
    assert {len(subject.encode()) for subject in longest} == {SUBJECT_SIZE_MAX}
    patterns = [*longest, ".".join("*" * 128), ".".join("*" * 127) + ".>", ">", "*"]
    for pattern in patterns:
        assert filter_problem(pattern) is None
        assert_all_agree([pattern], [], longest)


@pytest.mark.django_db
def test_the_most_and_widest_filters_are_not_too_much_for_postgresql() -> None:
    wide = [".".join(["*"] * (120 - number)) + f".x{number}.>" for number in range(64)]
    deep = [".".join(["a", "*"] * (60 - number)) + f".y{number}" for number in range(60)]
    given_subjects = [".".join("a" * length) for length in (1, 64, 128)]
    given_subjects += [f"{'a.' * 61}x59.b", f"{'a.' * 100}y10"]
    assert_all_agree(wide, deep, given_subjects)
    assert_all_agree(deep, wide, given_subjects)


def ideographs(count: int) -> str:
    return "".join(chr(0x4E00 + number) for number in range(count))


# Nearly as many as may be, of several kinds.
FULL = {
    "long": [f"{number:03}{'x' * 247}" for number in range(200)],
    "deep": [f"{'*.' * 110}x{number:03}.>" for number in range(114)],
    "many": [f"tenant-{number:04}.region-{number:04}.*.order.paid.>" for number in range(1_000)],
    "deep in other letters": [f"{'*.' * 20}{ideographs(400)[i * 40 :][:40]}" for i in range(10)]
    * 2,
    "in many letters": [ideographs(5_440)[i * 85 :][:85] for i in range(64)],
    "long in other letters": [ideographs(590)[i:][:80] for i in range(500)] + [ideographs(85)],
}


@pytest.mark.django_db
@pytest.mark.parametrize("patterns", FULL.values(), ids=FULL)
def test_all_filters_that_are_taken_are_read_by_postgresql(patterns: list[str]) -> None:
    assert all(filter_problem(pattern) is None for pattern in patterns)
    assert filters_problem(patterns) is None
    subject = patterns[-1].replace("*", "t").replace(">", "z.z")
    assert_all_agree(patterns, [], [subject])
    assert_all_agree([">"], patterns, [subject])


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        ([*FULL["long"], "x"], "they have 50,001 characters in all, the limit is 50,000"),
        (
            [*FULL["deep"], *FULL["deep in other letters"]],
            r"414 different characters, times 13,054 wildcards .*, make .*, the limit is 200,000",
        ),
        (
            [ideographs(8_000)[i * 80 :][:80] for i in range(100)],
            r"8,000 different characters, times 0 wildcards and .*, the limit is 200,000",
        ),
    ],
)
def test_what_is_too_much_for_postgresql_is_told_before(patterns: list[str], problem: str) -> None:
    assert re.search(problem, filters_problem(patterns) or "")


@pytest.mark.django_db
def test_a_filter_that_looks_like_a_slow_regular_expression_is_literal() -> None:
    assert_all_agree(["(a+)+$"], [], ["(a+)+$", "a" * 200 + "!"])


@pytest.mark.django_db(transaction=True)
def test_a_pull_leases_exactly_what_the_naive_matcher_selects() -> None:
    stream = StreamFactory.create()
    includes = ["*", "a.>", "%.*", "(a+)+$.b", "ä.*.\u0301"]
    excludes = ["_", "a.*.b", "%.%"]
    given_subjects = [*TOKENS, "a.b", "a.x.b", "a.x.b.c", "%.b", "%.%", "(a+)+$.b", "ä.b.\u0301"]
    publish_many([Event(subject=subject) for subject in given_subjects], stream=stream.name)
    consumer = ConsumerFactory.create(
        stream=stream, subject_includes=includes, subject_excludes=excludes
    )

    pulled = [task.event.subject for task in consumer.pull()]

    assert pulled == [s for s in given_subjects if naive_selects(includes, excludes, s)]
    assert [consumer.selects(subject) for subject in given_subjects] == [
        subject in pulled for subject in given_subjects
    ]
