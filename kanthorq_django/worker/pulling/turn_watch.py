"""When consumers that serialize are asked for turns again, after a claim that gave all there were.

Keys that other workers hold become free without a word; of those that become free here we know.
"""

import math
import time
from collections.abc import Iterable

from kanthorq_django.models import Consumer
from kanthorq_django.models.delivery.leased import Leased
from kanthorq_django.worker.backoff import GrowingWait

# Seconds until turns are looked for that other workers may have freed; more when there are none.
TURNS_AGAIN = 0.05


class TurnWatch:
    """What one worker knows of the turns of its consumers, by their ids."""

    def __init__(self, consumer_ids: Iterable[int], longest: float, *, is_patient: bool) -> None:
        """One that ``is_patient`` waits for keys that others have, ``longest`` seconds at most."""
        self.is_patient = is_patient
        self.freed_count = 0  # how often a key became free here
        self._none_until: dict[int, float] = {}
        self._waits = {pk: GrowingWait(TURNS_AGAIN, longest) for pk in consumer_ids}

    def none_until(self, consumer_id: int) -> float:
        """Return the moment before which there is no turn to be given, as far as is known."""
        return self._none_until.get(consumer_id, -math.inf)

    def seconds_without(self, consumer_id: int) -> float:
        """Return for how many seconds there is none."""
        until = self.none_until(consumer_id)
        if not self.is_patient and until < math.inf:
            return 0.0  # noted while a task of ours ran: before a burst ends it has to ask again
        return until - time.monotonic()

    def note_claim(self, consumer: Consumer, leased: list[Leased], freed_count: int) -> None:
        """Note what a claim found that began when ``freed_count`` keys had become free here."""
        if consumer.turns.were_all_given and freed_count == self.freed_count:
            # A burst does not wait for keys that others have, or whose first task waits itself.
            is_over = not (self.is_patient or leased)
            again_in = self._waits[consumer.pk].next()
            self._none_until[consumer.pk] = math.inf if is_over else time.monotonic() + again_in
        if leased:
            self._waits[consumer.pk].reset()

    def note_freed(self, consumer_id: int) -> None:
        """Note that a key became free here, from whatever thread."""
        self.freed_count += 1
        self._waits[consumer_id].reset()
        self.ask_again(consumer_id)

    def ask_again(self, consumer_id: int) -> None:
        """Let turns be asked for at once, as there may be new ones."""
        self._none_until.pop(consumer_id, None)  # a handler's end may be faster
