"""Subjects and their filters: what may be published, and that the matchers agree on it."""

import re
import unicodedata

from kanthorq_django.domain import subjects
from kanthorq_django.domain.names import name_problem
from kanthorq_django.exceptions import ConfigurationError, InvalidEvent, InvalidSubject
from kanthorq_django.models.publishing.envelope import (
    check_key,
    check_subject,
    settle_id,
    settle_schedule_at,
)
from kanthorq_django.models.stream import check_stream_name
from tests.fuzz.oracle import refusals
from tests.fuzz.reader import Reader

TOKENS = ("a", "b", "order", "*", ">", ".", ".", "..", "%", "_", "\\", "(a+)+$", "[^.]", "^", "ä")


def one(reader: Reader) -> None:
    """A subject is refused in words, or has the properties that its grammar promises."""
    subject = reader.text() if reader.chance() else reader.text(TOKENS, 40)
    with refusals(InvalidSubject) as refused:
        check_subject(subject)
    assert bool(refused) == (subjects.subject_problem(subject) is not None)
    if refused:
        return
    assert subject.isprintable()
    assert not re.search(r"[\s*>]|^\.|\.\.|\.$|^$", subject)
    assert len(subject.encode()) <= subjects.SUBJECT_SIZE_MAX
    assert unicodedata.normalize("NFC", subject) == subject
    assert subjects.filter_problem(subject) is None
    assert subjects.matches(subject, subject)


def filters(reader: Reader) -> None:
    """Python's matcher and the regular expression that PostgreSQL gets select the same."""
    patterns = [reader.text(TOKENS, 12) for _ in range(1 + reader.below(4))]
    valid = [pattern for pattern in patterns if subjects.filter_problem(pattern) is None]
    given = [reader.text(TOKENS, 12) for _ in range(1 + reader.below(4))]
    regex = re.compile(subjects.to_regex(valid))
    for subject in given:
        if subjects.subject_problem(subject) is None:
            selected = subjects.selects(valid, [], subject)
            assert selected == any(_naive(p.split("."), subject.split(".")) for p in valid)
            assert selected == (regex.search(subject) is not None), (valid, subject)
            assert not subjects.selects(valid, valid, subject)


def envelope(reader: Reader) -> None:
    """Keys, names, ids and due times of whatever type are taken or refused in words."""
    given = reader.anything()
    with refusals(InvalidEvent):
        check_key("resource_key", given, size_min=reader.below(2))
    with refusals(InvalidEvent):
        assert settle_schedule_at(given) == given
    with refusals(InvalidEvent):
        settle_id(given, set())
    with refusals(InvalidSubject):
        check_subject(given)
    with refusals(ConfigurationError) as refused:
        check_stream_name(given)
    assert bool(refused) == (name_problem(given) is not None)


def _naive(pattern: list[str], subject: list[str]) -> bool:
    if not pattern or not subject:
        return not pattern and not subject
    if pattern == [">"]:
        return True
    return pattern[0] in ("*", subject[0]) and _naive(pattern[1:], subject[1:])
