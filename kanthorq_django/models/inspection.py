"""Events that are to be published, checked and brought into the form in which they are stored."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.subjects import subject_problem
from kanthorq_django.exceptions import InvalidEvent
from kanthorq_django.models.body import MARK, encode_body, encode_metadata
from kanthorq_django.models.envelope import (
    UUID_VERSION_7,
    VERSION_BITS,
    check_key,
    check_subject,
    settle_id,
    settle_schedule_at,
)
from kanthorq_django.models.hops import count_hops

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

SLICE_SIZE = 1_000  # events


def inspected(
    model: "type[Event]", events: Sequence["Event"], stream: str
) -> Iterator[Sequence["Event"]]:
    """Yield ``events`` in slices, each as soon as it is checked.

    Raises InvalidEvent, which says of which of several it speaks.
    """
    inspector, hops_max = _Inspector(model, stream), get_settings().HOPS_MAX
    for start in range(0, len(events), SLICE_SIZE):
        checked = events[start : start + SLICE_SIZE]
        for index, event in enumerate(checked, start):
            try:
                inspector.inspect(event)
            except InvalidEvent as error:
                if len(events) == 1:
                    raise
                raise type(error)(f"events[{index}]: {error}") from error
        if hops_max is not None:
            count_hops(checked, hops_max)
        yield checked


class _Inspector:
    """Checks events that are published together, one after the other."""

    def __init__(self, model: "type[Event]", stream: str) -> None:
        self._model = model
        self._stream = stream
        self._ids: set[int] = set()  # of those before: Python hashes integers at once
        self._subjects: set[str] = set()
        self._limits = get_settings()

    def inspect(self, event: "Event") -> None:
        """Bring ``event`` into the form in which it is stored. Raises InvalidEvent."""
        if not self._is_plain(event):
            self._check(event)
            self._subjects.add(event.subject)

    def _is_plain(self, event: "Event") -> bool:
        """Tell whether ``_check()`` would change and refuse nothing, and note the id if so.

        Where many are published, most are like that: a subject that others have, and bytes.
        """
        if type(event) is not self._model or not event._state.adding:
            return False
        held = event.__dict__  # past Django's descriptors, which take as long as all of this
        body, subject, metadata = held.get("body"), held.get("subject"), held.get("metadata")
        number = held["id"].int if type(held.get("id")) is UUID else 0
        is_plain = (
            type(subject) is str
            and (subject in self._subjects or not subject_problem(subject))
            and type(body) is bytes
            and len(body) <= self._limits.BODY_SIZE_MAX
            and not body.startswith(MARK)
            and type(metadata) is dict
            and not metadata
            and held.get("resource_key") == ""
            and held["idempotency_key"] is held["schedule_at"] is held["stream_id"] is None
            and number & VERSION_BITS == UUID_VERSION_7
            and number not in self._ids
        )
        if is_plain:
            self._ids.add(number)
        return is_plain

    def _check(self, event: Any) -> None:
        if not isinstance(event, self._model):
            raise InvalidEvent(f"An Event was expected, not {type(event).__name__}.")
        if not event._state.adding:
            raise InvalidEvent(
                f"Event {event.pk} has been published already, even if that was rolled back; "
                "publish a new Event."
            )
        if event.stream_id is not None and event.stream.name != self._stream:
            raise InvalidEvent(
                f"The event names the stream {event.stream.name!r}, not {quoted(self._stream)}."
            )
        event.id = settle_id(event.id, self._ids)
        check_subject(event.subject)
        event.body = encode_body(event.body, size_max=self._limits.BODY_SIZE_MAX)
        event.metadata = encode_metadata(event.metadata, size_max=self._limits.METADATA_SIZE_MAX)
        if event.resource_key != "":
            check_key("resource_key", event.resource_key, size_min=0)
        if event.idempotency_key is not None:
            check_key("idempotency_key", event.idempotency_key, size_min=1)
        event.schedule_at = settle_schedule_at(event.schedule_at)
