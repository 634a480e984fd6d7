"""Subjects and subject filters: their grammar, and which filter selects which subject.

A subject is dot-separated tokens, most general first: ``order.cancelled.v2``. In a
filter ``*`` stands for exactly one token and a closing ``>`` for one or more.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from kanthorq_django.domain.quoting import quoted

SUBJECT_SIZE_MAX = 255  # bytes of UTF-8

# The filters of a consumer become one regular expression. PostgreSQL 15 and 18 refuse one of 65,536
# characters, or of fewer if their number times that of the different ones reaches 34 million. Where
# many wildcards meet many different characters, they compile for a minute before they give up.
FILTERS_SIZE_MAX = 50_000  # characters of all includes, or of all excludes, of a consumer
FILTERS_COST_MAX = 200_000  # different characters times wildcards: takes about a second
CHARACTERS_PER_WILDCARD = 150  # so many characters cost as much as one wildcard

ANY_TOKEN = "*"  # noqa: S105  # a wildcard, not a password
ANY_TAIL = ">"

_IN_SUBJECT = "a subject cannot hold wildcards; '*' and '>' are for filters"

_NEVER = "$.^"  # a regular expression that matches no subject


def subject_problem(subject: object) -> str | None:
    """Return what is wrong with ``subject`` in words, or None when it may be published."""
    return _concrete_problem(subject) if isinstance(subject, str) else _text_problem(subject)


@functools.lru_cache(maxsize=4_096)  # publishers repeat themselves
def _concrete_problem(subject: str) -> str | None:
    if problem := _text_problem(subject):
        return problem
    has_wildcard = ANY_TOKEN in subject or ANY_TAIL in subject
    return _IN_SUBJECT if has_wildcard else _tokens_problem(subject.split("."))


def filter_problem(pattern: object) -> str | None:
    """Return what is wrong with the subject filter ``pattern`` in words, or None."""
    if problem := _text_problem(pattern):
        return problem
    tokens = str(pattern).split(".")
    if ANY_TAIL in tokens[:-1]:
        return "'>' may only stand last"
    return _tokens_problem([token for token in tokens if token not in (ANY_TOKEN, ANY_TAIL)])


def filters_problem(patterns: Iterable[str]) -> str | None:
    """Return why PostgreSQL could not match by all of valid ``patterns``, in words, or None."""
    text = "".join(patterns)
    size, kinds = len(text), len(set(text))
    if size > FILTERS_SIZE_MAX:
        return f"they have {size:,} characters in all, the limit is {FILTERS_SIZE_MAX:,}"
    wildcards = text.count(ANY_TOKEN) + text.count(ANY_TAIL)
    cost = kinds * (wildcards + size // CHARACTERS_PER_WILDCARD)
    if cost > FILTERS_COST_MAX:
        return (
            f"their {kinds:,} different characters, times {wildcards:,} wildcards and one for each "
            f"{CHARACTERS_PER_WILDCARD} characters, make {cost:,}, the limit is "
            f"{FILTERS_COST_MAX:,}"
        )
    return None


def matches(pattern: str, subject: str) -> bool:
    """Tell whether the filter ``pattern`` selects ``subject``; both must be valid."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ANY_TAIL:
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(
        token in (ANY_TOKEN, other) for token, other in zip(wanted, given, strict=True)
    )


def selects(includes: Iterable[str], excludes: Iterable[str], subject: str) -> bool:
    """Tell whether any of ``includes`` and none of ``excludes`` match ``subject``."""
    return any(matches(pattern, subject) for pattern in includes) and not any(
        matches(pattern, subject) for pattern in excludes
    )


def to_regex(patterns: Sequence[str]) -> str:
    """Return one PostgreSQL regular expression that matches what any of ``patterns`` does.

    Every literal is escaped, so a filter never smuggles a pattern of its own into SQL.
    """
    if not patterns:
        return _NEVER
    return f"^(?:{'|'.join(map(_pattern_regex, patterns))})$"


@functools.lru_cache(maxsize=4_096)
def _pattern_regex(pattern: str) -> str:
    return r"\.".join(map(_token_regex, pattern.split(".")))


def _token_regex(token: str) -> str:
    if token == ANY_TOKEN:
        return "[^.]+"
    if token == ANY_TAIL:
        return ".+"
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", token)


def _text_problem(text: object) -> str | None:
    if not isinstance(text, str):
        return f"it must be a str, not {type(text).__name__}"
    if not text:
        return "it is empty"
    if not text.isprintable():
        return f"{quoted(_first_unprintable(text))} is not printable"
    size = len(text.encode())
    if size > SUBJECT_SIZE_MAX:
        return f"it has {size} bytes of UTF-8, the limit is {SUBJECT_SIZE_MAX}"
    if not unicodedata.is_normalized("NFC", text):
        return "it is not in Unicode normal form NFC; use unicodedata.normalize('NFC', …)"
    return None


def _first_unprintable(text: str) -> str:
    return next(character for character in text if not character.isprintable())


def _tokens_problem(tokens: Sequence[str]) -> str | None:
    for token in tokens:
        if not token:
            return "it has an empty token: a dot stands first, last, or beside another dot"
        if " " in token:
            return "it contains a space"
        if ANY_TOKEN in token or ANY_TAIL in token:
            return f"{quoted(token)} contains a wildcard; '*' and '>' are whole tokens of filters"
    return None
