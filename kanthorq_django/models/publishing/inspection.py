"""Events that are to be published, checked and brought into the form in which they are stored."""

from collections.abc import Iterable, Sequence
from itertools import chain, starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from uuid import UUID

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.subjects import subject_problem
from kanthorq_django.exceptions import InvalidEvent
from kanthorq_django.models.publishing.body import MARK, encode_body, encode_metadata
from kanthorq_django.models.publishing.envelope import (
    UUID_VERSION_7,
    VERSION_BITS,
    check_key,
    check_subject,
    settle_id,
    settle_schedule_at,
)
from kanthorq_django.models.publishing.hops import count_hops

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

SLICE_SIZE = 1_000  # events that are checked before the first of them is sent

_held = itemgetter(
    "id",
    "subject",
    "body",
    "metadata",
    "resource_key",
    "idempotency_key",
    "schedule_at",
    "stream_id",
)


class Inspection:
    """A check of events that are published together, each of which it sees once."""

    def __init__(self, model: "type[Event]", events: Sequence["Event"], stream: str) -> None:
        self._model = model
        self._events = events
        self._stream = stream
        self._ids: set[int] = set()  # of those before: Python hashes integers at once
        self._left: dict[int, Event] = {}
        # Those whose hops are counted, and the metadata that they had before.
        self._hopped: list[Event] = []
        self._given: list[dict[str, Any]] = []
        self._limits = get_settings()
        # Those that can be stored as they are, in slices. They are looked for while a COPY runs on
        # the connection, so that must not run a query, nor code of the application, which might.
        starts = range(0, len(events), SLICE_SIZE)
        self.plain: Iterable[list[Event]] = map(self._find_plain, starts)
        self._rest: list[Event] | None = None

    def begins_plain(self) -> bool:
        """Tell whether all of the first slice are plain, as most of the others are then."""
        slices = iter(self.plain)
        first = next(slices, [])
        self.plain = chain([first], slices)
        return not self._left

    def finish(self) -> list["Event"]:
        """Check all that are left; return those not plain, in the form in which they are stored.

        Raises InvalidEvent, which says of which of several it speaks.
        """
        if self._rest is None:
            self.plain = list(self.plain)
            self._rest = self._counted([*starmap(self._checked, self._left.items())])
        return self._rest

    def _find_plain(self, start: int) -> list["Event"]:
        """Return those of one slice that are plain, and note the others."""
        plain = []
        for index, event in enumerate(self._events[start : start + SLICE_SIZE], start):
            if self._is_plain(event):
                plain.append(event)
            else:
                self._left[index] = event
        return self._counted(plain)

    def _counted(self, events: list["Event"]) -> list["Event"]:
        if self._limits.HOPS_MAX is not None:
            self._hopped += events
            self._given += [event.metadata for event in events]
            count_hops(events, self._limits.HOPS_MAX)
        return events

    def take_back(self) -> None:
        """Give events that were not stored their metadata back as it was, without hops."""
        for event, metadata in zip(self._hopped, self._given, strict=True):
            event.metadata = metadata

    def _is_plain(self, event: "Event") -> bool:
        """Tell whether ``_check()`` would change and refuse nothing, and note the id if so."""
        if type(event) is not self._model or not event._state.adding:
            return False
        try:
            # Past Django's descriptors, which take as long as all of this.
            pk, subject, body, metadata, key, once, due_at, stream_id = _held(event.__dict__)
        except KeyError:  # one is deferred
            return False
        number = pk.int if type(pk) is UUID else 0
        is_plain = (
            type(subject) is str
            and not subject_problem(subject)
            and type(body) is bytes
            and len(body) <= self._limits.BODY_SIZE_MAX
            and not body.startswith(MARK)
            and type(metadata) is dict
            and not metadata
            and type(key) is str  # a lazy one would be compared by code of the application
            and not key
            and once is due_at is stream_id is None
            and number & VERSION_BITS == UUID_VERSION_7
            and number not in self._ids
        )
        if is_plain:
            self._ids.add(number)
        return is_plain

    def _checked(self, index: int, event: "Event") -> "Event":
        try:
            self._check(event)
        except InvalidEvent as error:
            if len(self._events) == 1:
                raise
            raise type(error)(f"events[{index}]: {error}") from error
        return event

    def _check(self, event: Any) -> None:
        if not isinstance(event, self._model):
            raise InvalidEvent(f"An Event was expected, not {type(event).__name__}.")
        event.id = settle_id(event.id, self._ids)  # first: one that stands twice is stored, perhaps
        if not event._state.adding:
            raise InvalidEvent(
                f"Event {event.pk} has been published already, even if that was rolled back; "
                "publish a new Event."
            )
        if event.stream_id is not None and event.stream.name != self._stream:
            raise InvalidEvent(
                f"The event names the stream {event.stream.name!r}, not {quoted(self._stream)}."
            )
        check_subject(event.subject)
        event.body = encode_body(event.body, size_max=self._limits.BODY_SIZE_MAX)
        event.metadata = encode_metadata(event.metadata, size_max=self._limits.METADATA_SIZE_MAX)
        if event.resource_key != "":
            check_key("resource_key", event.resource_key, size_min=0)
        if event.idempotency_key is not None:
            check_key("idempotency_key", event.idempotency_key, size_min=1)
        event.schedule_at = settle_schedule_at(event.schedule_at)
