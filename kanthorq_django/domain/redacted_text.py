"""Where secrets stand in text that is no JSON: settings, headers, forms, markup, tracebacks."""

import re
from collections.abc import Iterator
from itertools import chain

from kanthorq_django.domain.secret_keys import IsSecret

Span = tuple[int, int]

# Possessive, and only from a word's beginning: no text makes it go over a word twice.
_PAIR = re.compile(r"""(?<![\w.-])([\w.-]++)["'\])]{0,2}+[ \t]*+(?:=>|[=:])[ \t]*+""")
_TO_LINE_END = re.compile(r"[^&\r\n]*+")
_LINE = re.compile(r"\r?\n([ \t]*+)([^\r\n]*+)")
_BLOCK_MARKS = "|>+- \t"  # after which YAML goes on in the next line
# PostgreSQL's "Key (email, token)=(a@b.example, abc) already exists."
_KEY_DETAIL = re.compile(r"\(([^()\r\n]{1,500}+)\)=\([^\r\n]*+")
_URL_PASSWORD = re.compile(r"(?<=://)[^\s/@:]{0,200}+:([^\s/@]{1,500}+)@")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----")
_ELEMENT = re.compile(r"<([\w:.-]{1,200}+)(?:\s[^<>]{0,1000}+)?>")
_FORM_FIELD = re.compile(r'form-data;[^\r\n]{0,300}?\bname="?([^"\r\n;]{1,200})')
_BLANK_LINE = re.compile(r"\r?\n\r?\n")
_OPTION = re.compile(r"""(?<![\w-])--([\w-]{1,100}+)["']?,?[ \t]++["']?([^\s"',\]]++)""")
# An exception's name is no key: TokenError, shop.CardDeclined.
_EXCEPTION = re.compile(r"^(?:[a-z_]\w*+\.)*([A-Z]\w*+)(?=: )", re.MULTILINE)
_SECOND_WORD = re.compile(r"[a-z0-9][A-Z]")


def spans(text: str, is_secret: IsSecret, *, is_error: bool, placeholder: str) -> list[Span]:
    """Return where values of secret keys stand in ``text``, in order and apart from each other.

    Values that are ``placeholder`` already are left alone. In the text of an error or a
    traceback, names of exceptions are no keys.
    """
    found = [*_pairs(text, is_secret, is_error=is_error, placeholder=placeholder)]
    found += chain(
        _details(text, is_secret),
        _elements(text, is_secret),
        _form_fields(text, is_secret),
        _options(text, is_secret),
        _well_known(text, is_secret),
    )
    return _apart(found)


def _apart(found: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(found):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif begin < end:
            merged.append((begin, end))
    return merged


def _pairs(text: str, is_secret: IsSecret, *, is_error: bool, placeholder: str) -> Iterator[Span]:
    """Yield what follows ``key=`` or ``key:`` up to an ampersand or the end of the line."""
    names = set(_exceptions(text)) if is_error else set()
    at = 0
    for pair in _PAIR.finditer(text):
        is_passed = pair.start() < at or pair.start() in names
        is_hidden = text.startswith(placeholder, pair.end())
        if not (is_passed or is_hidden) and is_secret(pair[1]):
            at = _value_end(text, pair)
            yield pair.end(), at


def _exceptions(text: str) -> Iterator[int]:
    """Yield where lines begin with names of exceptions; one word alone may be a header's."""
    for found in _EXCEPTION.finditer(text):
        if _SECOND_WORD.search(found[1]):
            yield found.start()


def _value_end(text: str, pair: re.Match[str]) -> int:
    end = _line_end(text, pair.end())
    if text[end : end + 1] == "&" or text[pair.end() : end].strip(_BLOCK_MARKS):
        return end
    # Nothing on its own line: the value is what is indented under it.
    line = text[text.rfind("\n", 0, pair.start()) + 1 : pair.start()]
    indent, at = len(line) - len(line.lstrip(" \t")), end
    while (below := _LINE.match(text, at)) and (not below[2] or len(below[1]) > indent):
        at = below.end()
        end = at if below[2] else end
    return end


def _line_end(text: str, begin: int) -> int:
    found = _TO_LINE_END.match(text, begin)
    return len(text) if found is None else found.end()


def _details(text: str, is_secret: IsSecret) -> Iterator[Span]:
    for detail in _KEY_DETAIL.finditer(text):
        if any(is_secret(name.strip()) for name in detail[1].split(",")):
            yield detail.end(1) + len(")=("), detail.end()


def _elements(text: str, is_secret: IsSecret) -> Iterator[Span]:
    """Yield what stands in elements of XML or HTML, with the elements in them."""
    at = 0
    for element in _ELEMENT.finditer(text):
        if element.start() >= at and is_secret(element[1]):
            at = _before(text, f"</{element[1]}", element.end())
            yield element.end(), at


def _form_fields(text: str, is_secret: IsSecret) -> Iterator[Span]:
    """Yield the values of multipart forms."""
    at = 0
    for field in _FORM_FIELD.finditer(text):
        if field.start() >= at and is_secret(field[1]):
            blank = _BLANK_LINE.search(text, field.end())
            if blank is None:
                return
            at = _before(text, "\n--", blank.end())
            yield blank.end(), at


def _options(text: str, is_secret: IsSecret) -> Iterator[Span]:
    for option in _OPTION.finditer(text):
        if is_secret(option[1]):
            yield option.span(2)


def _well_known(text: str, is_secret: IsSecret) -> Iterator[Span]:
    """Yield secrets that are known by their form, where a key of that name is secret."""
    if is_secret("password"):
        yield from (found.span(1) for found in _URL_PASSWORD.finditer(text))
    at = len(text) if not is_secret("private_key") else 0
    while found := _PRIVATE_KEY.search(text, at):
        at = _before(text, "-----END", found.end())
        yield found.end(), at


def _before(text: str, ending: str, begin: int) -> int:
    """Return where ``ending`` begins, or where a text ends that was cut before it."""
    found = text.find(ending, begin)
    return len(text) if found < 0 else found
