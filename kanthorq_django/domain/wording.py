"""Recurrence rules in words, for people who do not read RFC 5545."""

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo

from kanthorq_django.domain.rules import WITHIN_DAYS, until_moment
from kanthorq_django.domain.times_of_day import numbers

_UNITS = {
    "YEARLY": "year",
    "MONTHLY": "month",
    "WEEKLY": "week",
    "DAILY": "day",
    "HOURLY": "hour",
    "MINUTELY": "minute",
}
_DAYS = {
    "MO": "Monday",
    "TU": "Tuesday",
    "WE": "Wednesday",
    "TH": "Thursday",
    "FR": "Friday",
    "SA": "Saturday",
    "SU": "Sunday",
}
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_ORDINALS = {-1: "last", -2: "last but one"}
_SUFFIXES = {1: "st", 2: "nd", 3: "rd"}
# What leaves few of the weekdays of a month or a year.
_CHOOSING = {"BYMONTHDAY", "BYYEARDAY", "BYWEEKNO", "BYSETPOS"}


def in_words(parts: Mapping[str, str], dtstart: datetime) -> str:
    """Return a rule's parts, and the local start that fills what they leave open, as a phrase."""
    phrases = [
        _every(parts),
        _days(parts),
        _dates(parts, dtstart),
        _months(parts),
        _rest(parts),
        _times(parts, dtstart),
        _end(parts, dtstart),
    ]
    return " ".join(phrase for phrase in phrases if phrase)


def _every(parts: Mapping[str, str]) -> str:
    unit, interval = _UNITS[parts["FREQ"]], int(parts.get("INTERVAL", "1"))
    return f"every {unit}" if interval == 1 else f"every {interval} {unit}s"


def _days(parts: Mapping[str, str]) -> str:
    if "BYDAY" not in parts:
        return ""
    # Of a week there is one; of a month or a year there are several.
    is_each = parts["FREQ"] in ("YEARLY", "MONTHLY") and _CHOOSING.isdisjoint(parts)
    plain = "each " if is_each else ""
    named = []
    for day in parts["BYDAY"].split(","):
        name, ordinal = _DAYS[day[-2:]], day[:-2]
        named.append(f"the {_ordinal(int(ordinal))} {name}" if ordinal else plain + name)
    return f"on {_list(named)}"


def _dates(parts: Mapping[str, str], dtstart: datetime) -> str:
    if "BYMONTHDAY" in parts:
        days = _list([_date(int(day)) for day in parts["BYMONTHDAY"].split(",")])
        is_monthly = parts["FREQ"] == "YEARLY" and "BYMONTH" not in parts
        return f"on {days} of each month" if is_monthly else f"on {days}"
    if parts.keys() & {"BYDAY", "BYYEARDAY"}:
        return ""
    if parts["FREQ"] == "WEEKLY" or ("BYWEEKNO" in parts and parts["FREQ"] != "DAILY"):
        return f"on {list(_DAYS.values())[dtstart.weekday()]}"
    if parts["FREQ"] == "YEARLY" and "BYMONTH" not in parts:
        return f"on {dtstart.day} {_MONTHS[dtstart.month - 1]}"
    return f"on {_date(dtstart.day)}" if parts["FREQ"] in ("YEARLY", "MONTHLY") else ""


def _date(day: int) -> str:
    return f"day {day}" if day > 0 else f"the {_ordinal(day)} day"


def _months(parts: Mapping[str, str]) -> str:
    if "BYMONTH" not in parts:
        return ""
    return f"in {_list([_MONTHS[int(month) - 1] for month in parts['BYMONTH'].split(',')])}"


def _rest(parts: Mapping[str, str]) -> str:
    names = {
        "BYYEARDAY": "day of the year",
        "BYWEEKNO": "in week",
        "BYSETPOS": "of these only number",
    }
    return ", ".join(f"{text} {parts[name]}" for name, text in names.items() if name in parts)


def _times(parts: Mapping[str, str], dtstart: datetime) -> str:
    second = int(parts.get("BYSECOND", dtstart.second))
    if parts["FREQ"] in WITHIN_DAYS:
        return _moments_of_the_hour(parts, dtstart, second)
    hours = numbers(parts, "BYHOUR", [dtstart.hour])
    minutes = numbers(parts, "BYMINUTE", [dtstart.minute])
    seconds = f":{second:02}" if second else ""
    times = [f"{hour:02}:{minute:02}{seconds}" for hour in hours for minute in minutes]
    return f"at {_list(times)}"


def _moments_of_the_hour(parts: Mapping[str, str], dtstart: datetime, second: int) -> str:
    told = {
        "hour": numbers(parts, "BYHOUR", ()),
        "minute": numbers(parts, "BYMINUTE", [dtstart.minute] if parts["FREQ"] == "HOURLY" else ()),
        "second": [second] if second else (),
    }
    return " ".join(f"at {unit} {','.join(map(str, some))}" for unit, some in told.items() if some)


def _end(parts: Mapping[str, str], dtstart: datetime) -> str:
    if "COUNT" in parts:
        return f"{parts['COUNT']} times" if parts["COUNT"] != "1" else "once"
    return f"until {_until(parts['UNTIL'], dtstart.tzinfo)}" if "UNTIL" in parts else ""


def _until(text: str, zone: tzinfo | None) -> str:
    """Return the end as the clocks of the start's zone show it."""
    until = until_moment(text)
    if "T" not in text:
        return str(until.date())
    if text.endswith("Z") and zone is not None:
        with contextlib.suppress(OverflowError):  # people write the year 9999 for ever
            until = until.replace(tzinfo=UTC).astimezone(zone)
    return f"{until.date()} {until.time():%H:%M:%S}".removesuffix(":00")


def _ordinal(number: int) -> str:
    if number in _ORDINALS:
        return _ORDINALS[number]
    if number < 0:
        return f"{_ordinal(-number)} last"
    is_teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if is_teen else _SUFFIXES.get(number % 10, 'th')}"


def _list(items: list[str]) -> str:
    *others, last = dict.fromkeys(items)  # a rule may name one thing twice
    return f"{', '.join(others)} and {last}" if others else last
