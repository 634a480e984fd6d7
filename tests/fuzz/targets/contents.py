"""Bodies, metadata, results, and what pages and logs make of them."""

import json
from typing import Any

from kanthorq_django.admin import content
from kanthorq_django.conf import SECRET_KEYS
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.redaction import REPLACEMENT, redact
from kanthorq_django.exceptions import InvalidBody
from kanthorq_django.message import encode_result
from kanthorq_django.models.publishing.body import encode_body, encode_metadata
from tests.fuzz.oracle import refusals
from tests.fuzz.reader import PIECES, Reader

SIZE_MAX = 16_384
MARK = "qzqz4711"  # stands for a secret; no piece contains it
SYNTAX = (
    '"',
    ":",
    ",",
    "{",
    "}",
    "[",
    "]",
    "\\",
    "=",
    "&",
    "\n",
    " ",
    "1",
    "null",
    "password",
    "x",
)


def bodies(reader: Reader) -> None:
    """A value is stored as strict JSON that reads back as it was, or refused by its place."""
    given = reader.json() if reader.chance(4) else reader.anything()
    with refusals(InvalidBody):
        stored = encode_body(given, size_max=SIZE_MAX)
        assert len(stored) <= SIZE_MAX
        if isinstance(given, str):
            assert stored.decode() == given
        elif not isinstance(given, bytes):
            assert_jsonb(stored.decode())
    with refusals(InvalidBody):
        text = encode_result(given)
        if text is not None:
            assert_jsonb(text)


def metadata(reader: Reader) -> None:
    """Metadata come back from jsonb equal to what publishing left on the event."""
    given = {reader.text(): reader.json() for _ in range(reader.below(4))}
    with refusals(InvalidBody):
        kept = encode_metadata(given, size_max=SIZE_MAX)
        assert assert_jsonb(json.dumps(kept)) == kept
        assert encode_metadata(kept, size_max=SIZE_MAX * 64) == kept


def redaction(reader: Reader) -> None:
    """No text makes redaction fail, and no neighbours let a secret through."""
    around = reader.text((*SYNTAX, *PIECES), 30)
    assert isinstance(redact(around, SECRET_KEYS), str)
    key = reader.pick(("password", "apiKey", "X-Api-Key", "CARD", "user_tokens", "PGPASSWORD2"))
    secret: Any = reader.pick((MARK, [MARK], {"a": [MARK, {"b": MARK}]}, f"{MARK}\\"))
    try:
        text = json.dumps(
            [around, {key: secret, "z": around}, around], ensure_ascii=reader.chance()
        )
        shown = redact(text, SECRET_KEYS)
        expected = json.loads(text)
        expected[1][key] = REPLACEMENT
        assert json.loads(shown) == expected
    finally:
        shown = redact(f"{around}\n{key}={MARK}", SECRET_KEYS)
    assert MARK not in shown
    cut = text[: reader.below(len(text) + 1)]
    assert MARK not in redact(cut, SECRET_KEYS), cut


def pages(reader: Reader) -> None:
    """Any bytes are shown as something that hides nothing and turns nothing around."""
    data = reader.take(reader.below(64)) + reader.text().encode(errors="surrogatepass")
    shown = content.describe(data, len(data) + reader.below(2))
    assert shown.kind in ("json", "text", "hex", "empty")
    assert all(c.isprintable() or c in "\n\t\r" for c in shown.text), shown.text


def failures(reader: Reader) -> None:
    """Whatever a handler raises is kept as text that PostgreSQL, a log and a page can take."""
    text = reader.text(most=20)
    reason = RuntimeError(text, reader.anything()) if reader.chance() else text
    failure = Failure.of(reason, stack_size_max=200)
    assert "\n" not in failure.error
    for kept in (failure.error, failure.stack):
        assert_jsonb(json.dumps(kept))
        assert not set(kept) & set("\x1b\u202e\u2066\u2028")
    assert len(failure.stack) <= 200


def assert_jsonb(text: str) -> Any:
    """Fail unless PostgreSQL would take ``text`` as jsonb; return it as it would be read."""
    value = json.loads(text, parse_constant=_refuse, parse_float=_numeric)
    text.encode()
    flat = json.dumps(value, ensure_ascii=False)
    flat.encode()
    assert "\\u0000" not in flat.replace("\\\\", "")
    return value


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _numeric(text: str) -> float | int:
    """PostgreSQL keeps numbers in decimals, and writes those without a fraction as integers."""
    mantissa, _, exponent = text.lower().partition("e")
    digits = len(mantissa.partition(".")[2])
    if int(exponent or 0) < digits or not exponent:
        return float(text)
    shift: int = 10 ** (int(exponent) - digits)
    return int(mantissa.replace(".", "")) * shift
