"""Values that pages and terminals do not show, by the keys that they stand under."""

import functools
import json
import re
from collections.abc import Callable, Iterator

REPLACEMENT = "[redacted]"

# Strings, also one that a cut left open; structure; and the rest: numbers and words.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)
_OPENING, _CLOSING = ("{", "["), ("}", "]")
# Possessive, and only from a word's beginning: no text makes it go over a word twice.
_PAIR = re.compile(r'(?<![\w.-])([\w.-]++)"?[ \t]*+[=:][ \t]*+')
_QUOTED = json.dumps(REPLACEMENT)
_VALUE_END = re.compile(r"[&\r\n]|\Z")
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def redact(text: str, keys: tuple[str, ...]) -> str:
    """Return ``text`` without the values of ``keys``: in JSON at any depth, else to a line's end.

    A key is meant by its words, however they are written: ``api_key`` is also ``apiKey`` and
    ``X-API-Key``, and ``card`` is not ``discard``.
    """
    is_secret = _matcher(keys)
    shown = _without(text, _values(text, is_secret), _QUOTED)
    if _is_json(text):
        return shown
    return _without(shown, _rests(shown, is_secret), REPLACEMENT)


def _without(text: str, spans: Iterator[tuple[int, int]], replacement: str) -> str:
    pieces, at = [], 0
    for begin, end in spans:
        pieces += [text[at:begin], replacement]
        at = end
    return "".join([*pieces, text[at:]])


def _values(text: str, is_secret: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
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


def _rests(text: str, is_secret: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
    """Yield what follows ``key=`` or ``key:`` up to an ampersand or the end of the line."""
    at = 0
    for pair in _PAIR.finditer(text):
        is_done = pair.start() < at or text.startswith(_QUOTED, pair.end())
        if not is_done and is_secret(pair[1]):
            ending = _VALUE_END.search(text, pair.end())
            at = len(text) if ending is None else ending.start()
            yield pair.end(), at


@functools.lru_cache(maxsize=8)
def _matcher(keys: tuple[str, ...]) -> Callable[[str], bool]:
    wanted = [words for key in keys if (words := _words(key))]
    marks = [f"_{'_'.join(words)}{plural}_" for words in wanted for plural in ("", "s")]
    compact = {"".join(words) for words in wanted}

    @functools.lru_cache(maxsize=1_024)
    def is_secret(name: str) -> bool:
        words = _words(name)
        joined = f"_{'_'.join(words)}_"
        return "".join(words) in compact or any(mark in joined for mark in marks)

    return is_secret


def _words(name: str) -> list[str]:
    spaced = _WORD_BORDER.sub("_", name[:200])
    return [word for word in re.split(r"[\W_]+", spaced.casefold()) if word]


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
