"""Values that pages and terminals do not show, by the keys that they stand under."""

import json
import re
from collections.abc import Collection, Iterable, Iterator

from kanthorq_django.domain import redacted_text
from kanthorq_django.domain.secret_keys import IsSecret, matcher

REPLACEMENT = "[redacted]"

Path = tuple[str | int | None, ...]
Change = tuple[int, int, str]  # from where to where, and what to put there

# Strings, also one that a cut left open; structure; and the rest: numbers and words.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)
_OPENING, _CLOSING = ("{", "["), ("}", "]")
_QUOTED = json.dumps(REPLACEMENT)
_TELLING = re.compile(r"[=:<]|--")  # without any of these a string holds no key
_LEVELS_MAX = 3  # of JSON in a string of JSON


class NotRestorable(ValueError):
    """A text holds a replacement, and nothing says what stood there; it tells where."""


def redact(text: str, keys: tuple[str, ...], *, is_error: bool = False) -> str:
    """Return ``text`` without the values of ``keys``: in JSON at any depth, else to a line's end.

    A key is meant by its words, however they are written: ``api_key`` is also ``apiKey`` and
    ``X-API-Key`` and ``api_key2``, and ``card`` is not ``discard``. ``is_error`` says that it is
    the text of an exception, or its traceback.
    """
    return _redacted(text, matcher(keys), _LEVELS_MAX, is_error=is_error)


def restore(text: str, stored: str, keys: tuple[str, ...]) -> str:
    """Return ``text`` with what ``stored`` has where ``text`` has a replacement.

    Somebody was shown ``redact(stored)`` and sends it back, perhaps changed. Raises
    NotRestorable for a replacement that stands elsewhere, or inside of a list, whose items may
    have changed places.
    """
    if REPLACEMENT not in text:
        return text
    if text == redact(stored, keys):
        return stored
    if not (_is_json(text) and _is_json(stored)):
        raise NotRestorable("a text that was changed")
    return _without(text, _restored(text, _hidden(stored, matcher(keys))))


def _redacted(text: str, is_secret: IsSecret, levels: int, *, is_error: bool = False) -> str:
    if _is_json(text):
        return _without(text, _json_changes(text, is_secret, levels))
    shown = _without(text, ((*span, _QUOTED) for span in _values(text, is_secret)))
    spans = redacted_text.spans(shown, is_secret, is_error=is_error, placeholder=_QUOTED)
    return _without(shown, ((*span, REPLACEMENT) for span in spans))


def _without(text: str, changes: Iterable[Change]) -> str:
    pieces, at = [], 0
    for begin, end, replacement in changes:
        pieces += [text[at:begin], replacement]
        at = end
    return "".join([*pieces, text[at:]])


def _json_changes(text: str, is_secret: IsSecret, levels: int) -> Iterator[Change]:
    """Yield what is not to be seen of JSON, also what strings say: addresses, forms, JSON again."""
    at = 0
    for begin, end in [*_values(text, is_secret), (len(text), len(text))]:
        for token in _TOKEN.finditer(text, at, begin):
            if token[0].startswith('"') and levels and _TELLING.search(token[0]):
                told = _unquoted(token[0])
                shown = _redacted(told, is_secret, levels - 1)
                if shown != told:
                    yield *token.span(), json.dumps(shown, ensure_ascii="\\u" in token[0])
        if begin < end:
            yield begin, end, _QUOTED
        at = end


def _values(text: str, is_secret: IsSecret) -> Iterator[tuple[int, int]]:
    """Yield where the JSON values of secret keys stand."""
    tokens = _TOKEN.finditer(text)
    former = ""
    for token in tokens:
        if token[0] == ":" and former.startswith('"') and is_secret(_unquoted(former)):
            if span := _value(tokens):
                yield span
            former = ""
        else:
            former = token[0]


def _value(tokens: Iterator[re.Match[str]]) -> tuple[int, int] | None:
    """Consume one value, however deep it is nested; None if the text ends before it."""
    begin, end, depth = None, 0, 0
    for token in tokens:
        begin = token.start() if begin is None else begin
        end = token.end()
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if depth <= 0:
            break
    return None if begin is None else (begin, end)


def _hidden(stored: str, is_secret: IsSecret) -> dict[Path, tuple[str, str]]:
    """Return what is shown and what is stored at each place of which something is not shown.

    Without places inside of lists, and without keys that an object has twice.
    """
    changes = {change[0]: change for change in _json_changes(stored, is_secret, _LEVELS_MAX)}
    found: dict[Path, tuple[str, str]] = {}
    unclear: set[Path] = set()
    for path, place in _places(stored, changes):
        begin, end, shown = changes[place]
        if path in found or any(isinstance(step, int) for step in path):
            unclear.add(path)
        found[path] = json.loads(shown), stored[begin:end]
    return {path: found[path] for path in found.keys() - unclear}


def _restored(text: str, hidden: dict[Path, tuple[str, str]]) -> Iterator[Change]:
    masks = {
        token.start(): token
        for token in _TOKEN.finditer(text)
        if REPLACEMENT in _unquoted(token[0])
    }
    for path, place in _places(text, masks):
        token = masks.pop(place)
        shown, stored = hidden.get(path, (None, ""))
        if _unquoted(token[0]) != shown:
            raise NotRestorable(_spelled(path))
        yield *token.span(), stored
    if masks:
        raise NotRestorable("a key")


def _places(text: str, wanted: Collection[int]) -> Iterator[tuple[Path, int]]:
    """Yield the path to each value of JSON ``text`` that begins at one of ``wanted``."""
    path: list[str | int | None] = []
    for token in _TOKEN.finditer(text):
        if _is_step(path, token[0]):
            continue
        if token.start() in wanted:
            yield tuple(path), token.start()
        if token[0] in _OPENING:
            path.append(0 if token[0] == "[" else None)


def _is_step(path: list[str | int | None], piece: str) -> bool:
    """Let ``path`` follow a ``piece`` that begins no value; tell whether it is one."""
    if piece in _CLOSING:
        path.pop()
    elif piece == ",":
        path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
    elif path and path[-1] is None:
        path[-1] = _unquoted(piece)
    else:
        return piece == ":"
    return True


def _spelled(path: Path) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"${''.join(steps)}"[:200]


def _unquoted(token: str) -> str:
    try:
        return str(json.loads(token))
    except ValueError:
        return token


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
