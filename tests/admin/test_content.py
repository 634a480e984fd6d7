import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django.admin import content
from kanthorq_django.admin.content import describe, pretty

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_pretty_json_means_what_it_meant(value: object):
    text = json.dumps(value)
    assert json.loads(pretty(text)) == json.loads(text)


def test_pretty_json_is_indented():
    assert pretty('{"a":[1,{}],"b":"x, y"}') == (
        '{\n  "a": [\n    1,\n    {}\n  ],\n  "b": "x, y"\n}'
    )


@pytest.mark.parametrize(
    "text",
    ["12345678901234567890.10", '{"a": 1, "a": 2}', '"caf\\u00e9 \\ud83d"', '"a \\" b"'],
)
def test_pretty_json_keeps_what_a_parser_would_lose(text: str):
    assert "".join(pretty(text).split()) == "".join(text.split())


def _kind(body: bytes) -> str:
    return describe(body, len(body)).kind


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "empty"),
        (b'{"a": 1}', "json"),
        (b"plain", "text"),
        ("Ünïcode\nlines".encode(), "text"),
        (b"\x89PNG\r\n\x1a\n", "hex"),
        (b"null byte \x00", "hex"),
        (b"escape \x1b[31m", "hex"),
        ("ä".encode()[:1], "hex"),
        (b"[" * 60_000, "text"),
        (b"9" * 5_000, "text"),
    ],
)
def test_bytes_are_shown_as_what_they_are(body: bytes, kind: str):
    assert _kind(body) == kind


def test_a_hex_dump_has_offsets_bytes_and_letters():
    shown = describe(b"\x00\x01ABCDEFGHIJKLMNOPQ", 19).text
    assert shown == (
        "00000000  00 01 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e  ..ABCDEFGHIJKLMN\n"
        "00000010  4f 50 51                                         OPQ"
    )


def test_a_long_body_is_cut_even_within_a_character():
    body = "ä".encode() * content.READ_MAX
    shown = describe(body[: content.READ_MAX - 1], len(body))
    assert shown.kind == "text"
    assert shown.is_cut
    assert shown.text == "ä" * (content.READ_MAX // 2 - 1)


def test_long_json_of_which_only_the_start_was_read_is_text():
    body = json.dumps(["x"] * 50_000).encode()
    shown = describe(body[: content.READ_MAX], len(body))
    assert (shown.kind, shown.is_cut) == ("text", True)


def test_indenting_cannot_blow_a_body_up_without_limit():
    depth = 900
    body = ("[" * depth + "[]," * 18_000 + "[]" + "]" * depth).encode()
    shown = describe(body, len(body))
    assert shown.kind == "json"
    assert shown.is_cut
    assert len(shown.text) == content.SHOWN_MAX


def test_characters_that_hide_or_turn_text_around_are_spelled_out():
    shown = describe("pay \u202eevil\u200b me".encode(), 20).text
    assert shown == "pay \\u202eevil\\u200b me"


def test_line_ends_of_mails_and_forms_are_line_ends():
    assert describe(b"To: a\r\n\r\nb\rc", 12).text == "To: a\n\nb\\rc"
