"""What an event may carry: bytes as they are, str as UTF-8, anything else as JSON.

Everything is checked here, before SQL: an error of the database would break the caller's
transaction, one of ours leaves it usable.
"""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, cast

from django.core.serializers.json import DjangoJSONEncoder

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.quoting import printable, quoted
from kanthorq_django.exceptions import InvalidBody

# What encrypted bodies begin with in the table: see encryption.py.
MARK = b"\x00kanthorq:fernet:1\x00"
_NUL = "\x00"
_ROOT = "$"  # the place of the whole value
_BYTES = (bytes, bytearray, memoryview)  # to join them by | would take longer than to ask
PATH_SIZE_MAX = 120  # characters of the place of a fault
WORDS_SIZE_MAX = 200  # characters of an encoder's own words


def encode_body(body: object, *, size_max: int) -> bytes:
    """Return ``body`` as the bytes to store.

    Raises InvalidBody, naming the offending place (``$.lines[3].price``) or the size.
    """
    if isinstance(body, _BYTES):
        try:
            encoded = bytes(body)
        except ValueError as error:  # of a view that was released
            raise InvalidBody(f"The body cannot be read: {error}.") from error
    elif isinstance(body, str):
        encoded = _utf8(body, _ROOT)
    else:
        encoded = encode_json("body", body, size_max=size_max).encode()
    if encoded.startswith(MARK):
        raise InvalidBody("The body begins with the mark of encrypted bodies; it is reserved.")
    if len(encoded) > size_max:
        _check_size("body", len(encoded), size_max)
    return encoded


def encode_json(name: str, value: object, *, size_max: int) -> str:
    """Return ``value`` as JSON text that PostgreSQL's jsonb takes as well.

    Raises InvalidBody if ``name``'s value holds NaN, an infinity, NUL, half a surrogate
    pair, too deep a nesting, or what DjangoJSONEncoder cannot encode.
    """
    try:
        text = json.dumps(value, cls=DjangoJSONEncoder, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        told = _first_fault(value) or printable(str(error), WORDS_SIZE_MAX)
        raise InvalidBody(f"{name}: {told}.") from error
    # Before it is walked: what is far too large may take a while.
    _check_size(name, len(text), size_max)
    if _is_suspicious(text) and (problem := _fault_within(text)):
        raise InvalidBody(f"{name}: {problem}.")
    _check_size(name, len(text.encode()), size_max)
    return text


def encode_metadata(metadata: object, *, size_max: int) -> dict[str, Any]:
    """Return ``metadata`` as it is read back. Raises InvalidBody unless it is a JSON object."""
    if type(metadata) is dict and not metadata:
        return {}
    if not isinstance(metadata, Mapping):
        raise InvalidBody(f"metadata must be a dict, not {type(metadata).__name__}.")
    for key in metadata:
        if not isinstance(key, str):
            raise InvalidBody(f"metadata: the key {quoted(key)} is not a str.")
    if not metadata:
        return {}
    encoded = encode_json("metadata", dict(metadata), size_max=size_max)
    # Only floats from 1e16 on are written with an exponent above zero.
    parse_float = _as_jsonb if "e+" in encoded else None
    return cast("dict[str, Any]", json.loads(encoded, parse_float=parse_float))


def _as_jsonb(number: str) -> int | float:
    """PostgreSQL takes 1e+23 for a decimal, and gives back what has no fraction as an integer."""
    decimal = Decimal(number)
    return (
        int(decimal) if decimal == decimal.to_integral_value() and "e" in number else float(number)
    )


def _check_size(name: str, size: int, size_max: int) -> None:
    if size > size_max:
        raise InvalidBody(
            f"The {name} has {size:,} bytes, the limit is {size_max:,} "
            f"(KANTHORQ[{name.upper() + '_SIZE_MAX'!r}])."
        )


def _utf8(text: str, path: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidBody(f"body: {path} holds half a surrogate pair.") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_suspicious(text: str) -> bool:
    """Tell by cheap scans whether JSON ``text`` has to be walked; few have."""
    depth_max = get_settings().DEPTH_MAX
    brackets = text.count("[") + text.count("{") if len(text) > depth_max else 0
    return "\\u0000" in text or brackets > depth_max or not _is_utf8(text)


def _fault_within(text: str) -> str | None:
    """Return what is wrong in encoded ``text``: a lazy string tells nothing before."""
    try:
        return _first_fault(json.loads(text))
    except RecursionError:  # the writer goes deeper than the reader in some releases of Python
        return f"{_ROOT} is nested deeper than {get_settings().DEPTH_MAX} (KANTHORQ['DEPTH_MAX'])"


def _first_fault(value: object) -> str | None:
    return next(_faults(value, _ROOT, get_settings().DEPTH_MAX), None)


def _faults(value: object, path: str, levels: int) -> Iterator[str]:
    """Yield what JSON cannot take in ``value``, each with its path, the first one first.

    ``levels`` is how many containers, an empty one as well, may lie within each other.
    """
    if levels < 1 and isinstance(value, dict | list | tuple):
        limit = get_settings().DEPTH_MAX
        yield f"{path} is nested deeper than {limit} (KANTHORQ['DEPTH_MAX'])"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _key_faults(key, path)
            name = key if isinstance(key, str) else quoted(key)
            yield from _faults(item, _step(path, f".{name}"), levels - 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _faults(item, _step(path, f"[{index}]"), levels - 1)
    else:
        yield from _leaf_faults(value, path)


def _step(path: str, name: str) -> str:
    return path if path.endswith("…") else printable(path + name, PATH_SIZE_MAX)


def _key_faults(key: object, path: str) -> Iterator[str]:
    if isinstance(key, str):
        yield from _leaf_faults(key, f"a key of {path}")
    elif not isinstance(key, int | float | bool | None):
        yield f"a key of {path} is a {type(key).__name__}"


def _leaf_faults(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}, which is not JSON"
    elif isinstance(value, str) and _NUL in value:
        yield f"{path} holds a NUL character"
    elif isinstance(value, str) and not _is_utf8(value):
        yield f"{path} holds half a surrogate pair"
    else:
        try:
            json.dumps(value, cls=DjangoJSONEncoder)
        except (TypeError, ValueError) as error:
            told = printable(str(error), WORDS_SIZE_MAX)
            yield told if path == _ROOT else f"{path}: {told}"
