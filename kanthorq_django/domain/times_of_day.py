"""When HOURLY and MINUTELY rules occur on a day that matches: arithmetic instead of a search.

dateutil goes from step to step, and where none ever matches, on to the year 9999.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, Self

_HOUR, _MINUTE = timedelta(hours=1), timedelta(minutes=1)


class TimesOfDay(NamedTuple):
    """The times of one day, as ``steps`` of a ``unit`` from midnight, each with ``offsets``.

    A step counts if its distance from ``origin`` is a multiple of ``interval`` units. The times are
    the step plus each of the offsets: the minutes of an hour, or the second of a minute.
    """

    origin: datetime
    unit: timedelta
    interval: int
    steps: Sequence[int]
    offsets: Sequence[timedelta]

    @classmethod
    def of(cls, parts: Mapping[str, str], origin: datetime) -> Self:
        """Return the times that a rule's ``parts`` choose, from its local ``origin`` on."""
        interval = int(parts.get("INTERVAL", "1"))
        hours = numbers(parts, "BYHOUR", range(24))
        (second,) = numbers(parts, "BYSECOND", [origin.second])
        if parts["FREQ"] == "HOURLY":
            minutes = numbers(parts, "BYMINUTE", [origin.minute])
            offsets = [timedelta(minutes=minute, seconds=second) for minute in minutes]
            return cls(origin.replace(minute=0, second=0), _HOUR, interval, hours, offsets)
        minutes = numbers(parts, "BYMINUTE", range(60))
        steps = [hour * 60 + minute for hour in hours for minute in minutes]
        return cls(origin.replace(second=0), _MINUTE, interval, steps, [timedelta(seconds=second)])

    def on(self, day: datetime) -> Iterator[datetime]:
        """Yield the times on ``day``, a midnight, in their order."""
        passed = (day - self.origin) // self.unit
        for step in self.steps:
            if (passed + step) % self.interval == 0:
                for offset in self.offsets:
                    yield day + step * self.unit + offset


def numbers(parts: Mapping[str, str], name: str, default: Sequence[int]) -> Sequence[int]:
    """Return the numbers of a part of a rule, each once and sorted."""
    if name not in parts:
        return default
    return sorted({int(number) for number in parts[name].split(",")})
