"""Events as rows of a binary COPY, which PostgreSQL reads in three quarters of the time of text.

https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format": each field is preceded by
its length, -1 for NULL; jsonb begins with its version; moments are microseconds since 2000.
Text is in the encoding of the connection: the option ENCODING is for the other formats alone.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from django.db import connections
from django.utils import timezone

from kanthorq_django.conf import get_settings
from kanthorq_django.models.fields import EPOCH
from kanthorq_django.models.publishing.encryption import seal

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

CHUNK_SIZE = 2**16  # bytes about; the server reads them while the next are being made
Y2000 = datetime(2000, 1, 1, tzinfo=UTC)

_MICROSECONDS_TO_2000 = (Y2000 - EPOCH) // timedelta(microseconds=1)
_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_TRAILER = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_HEAD = struct.pack("!hi", 8, 16)  # eight columns, of which the id has sixteen bytes
_length = struct.Struct("!i").pack
_integer = struct.Struct("!iq").pack
_EMPTY, _NO_METADATA = _length(0), _length(3) + b"\x01{}"
_PLAIN = _NO_METADATA + _EMPTY + _NULL


def copied(events: Iterable["Event"], moment: Any, using: str, encoding: str) -> Iterator[bytes]:
    """Yield what COPY FROM STDIN takes for checked events, published at ``moment``."""
    stream = _integer(8, moment.stream_id)
    created_at = _integer(8, moment.microseconds - _MICROSECONDS_TO_2000)
    subjects: dict[str, bytes] = {}
    is_sealed = bool(get_settings().BODY_KEYS)
    plain = _PLAIN + created_at
    parts, size = [_HEADER], 0
    for event in events:
        subject, body = event.subject, event.body
        if is_sealed:
            body = seal(event.id, body)
        if subject not in subjects:
            subjects[subject] = stream + _field(subject.encode(encoding))
        is_plain = not event.metadata and not event.resource_key and event.schedule_at is None
        parts += (
            _HEAD,
            event.id.int.to_bytes(16, "big"),
            subjects[subject],
            _length(len(body)),
            body,
            plain if is_plain else _rest(event, encoding, using) + created_at,
        )
        size += len(body)
        if size >= CHUNK_SIZE or len(parts) >= CHUNK_SIZE // 32:
            yield b"".join(parts)
            parts, size = [], 0
    parts.append(_TRAILER)
    yield b"".join(parts)


def _rest(event: "Event", encoding: str, using: str) -> bytes:
    return (
        (_metadata(event.metadata, encoding) if event.metadata else _NO_METADATA)
        + _field(event.resource_key.encode(encoding))
        + _moment(event.schedule_at, using)
    )


def _field(content: bytes) -> bytes:
    return _length(len(content)) + content


def _metadata(metadata: dict[str, Any], encoding: str) -> bytes:
    return _field(b"\x01" + json.dumps(metadata, ensure_ascii=False).encode(encoding))


def _moment(moment: datetime | None, using: str) -> bytes:
    if moment is None:
        return _NULL
    if timezone.is_naive(moment):
        # As the server would read it: what the clocks show twice, or never, is standard time.
        zone = ZoneInfo(connections[using].timezone_name)
        aware = (moment.replace(fold=fold, tzinfo=zone) for fold in (0, 1))
        moment = min(aware, key=lambda each: each.utcoffset() or timedelta(0))
    return _integer(8, (moment - Y2000) // timedelta(microseconds=1))
