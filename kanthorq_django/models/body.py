"""What an event may carry: bytes as they are, str as UTF-8, anything else as JSON.

Everything is checked here, before SQL: an error of the database would break the caller's
transaction, one of ours leaves it usable.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder

from kanthorq_django.exceptions import InvalidBody

DEPTH_MAX = 100
_NUL = "\x00"


def encode_body(body: object, *, size_max: int) -> bytes:
    """Return ``body`` as the bytes to store.

    Raises InvalidBody, naming the offending place (``$.lines[3].price``) or the size.
    """
    if isinstance(body, bytes | bytearray | memoryview):
        encoded = bytes(body)
    elif isinstance(body, str):
        encoded = _utf8(body, "$")
    else:
        encoded = encode_json("body", body, size_max=size_max).encode()
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
        raise InvalidBody(_explain(name, value, error)) from error
    if "\\u0000" in text or not _is_utf8(text) or _depth_bound(text) > DEPTH_MAX:
        for problem in _faults(value, "$", 0):
            raise InvalidBody(f"{name}: {problem}.")
    _check_size(name, len(text.encode()), size_max)
    return text


def encode_metadata(metadata: object, *, size_max: int) -> str:
    """Return ``metadata`` as JSON text. Raises InvalidBody unless it is a JSON object."""
    if not isinstance(metadata, dict):
        raise InvalidBody(f"metadata must be a dict, not {type(metadata).__name__}.")
    for key in metadata:
        if not isinstance(key, str):
            raise InvalidBody(f"metadata: the key {key!a} is not a str.")
    return encode_json("metadata", metadata, size_max=size_max)


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


def _depth_bound(text: str) -> int:
    """An upper bound that costs two scans; only what exceeds it is walked."""
    return text.count("[") + text.count("{") if len(text) > DEPTH_MAX else 0


def _explain(name: str, value: object, error: Exception) -> str:
    for problem in _faults(value, "$", 0):
        return f"{name}: {problem}."
    return f"{name}: {error}"


def _faults(value: object, path: str, depth: int) -> Iterator[str]:
    """Yield what JSON cannot take in ``value``, each with its path, the first one first."""
    if depth > DEPTH_MAX:
        yield f"{path[:80]}… is nested deeper than {DEPTH_MAX}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _key_faults(key, path)
            yield from _faults(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}[{index}]", depth + 1)
    else:
        yield from _leaf_faults(value, path)


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
            yield f"{path}: {error}"
