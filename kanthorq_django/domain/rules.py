"""The text of a recurrence rule (RFC 5545): taken apart, and refused for what is wrong with it.

What passes here costs a bounded search: frequencies, counts and numbers have limits.
"""

import math
import re
from collections.abc import Mapping
from datetime import MAXYEAR, datetime, time

from dateutil.rrule import rrulestr

from kanthorq_django.domain.quoting import quoted

TEXT_SIZE_MAX = 500  # characters
COUNT_MAX = 10_000
# 40 years: nobody waits longer for a next time, but for one that is as rare as 29 February.
INTERVALS_MAX = {"YEARLY": 40, "MONTHLY": 480}
INTERVAL_MAX = 1_000  # of the other frequencies
# Times in one day, unless the rule is HOURLY or MINUTELY, whose times take less work to find.
TIMES_MAX = 100

FREQUENCIES = ("YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY")
WITHIN_DAYS = ("HOURLY", "MINUTELY")
DAY_PARTS = ("BYMONTH", "BYMONTHDAY", "BYYEARDAY", "BYDAY")
_RANGES = {
    "BYSECOND": range(60),
    "BYMINUTE": range(60),
    "BYHOUR": range(24),
    "BYMONTHDAY": (*range(-31, 0), *range(1, 32)),
    "BYYEARDAY": (*range(-366, 0), *range(1, 367)),
    "BYWEEKNO": (*range(-53, 0), *range(1, 54)),
    "BYMONTH": range(1, 13),
    "BYSETPOS": (*range(-366, 0), *range(1, 367)),
}
_PREFIX = re.compile("^RRULE:", re.ASCII | re.IGNORECASE)
_CRON = re.compile(
    r"@[a-z]+|[\d*][\d*/,-]*(\s+([\d*/,?#-]|[A-Z]{3})+){4}", re.ASCII | re.IGNORECASE
)
_NUMBER = re.compile(r"[+-]?\d{1,3}", re.ASCII)
_WEEKDAY = re.compile(r"([+-]?\d{1,2})?(MO|TU|WE|TH|FR|SA|SU)", re.ASCII)
_UNTIL = re.compile(r"\d{8}(T\d{6}Z?)?", re.ASCII)
_WEEKS_IN_MONTH, _WEEKS_IN_YEAR = 5, 53


class RecurrenceProblem(ValueError):
    """A rule that is malformed, goes beyond a limit, or never occurs.

    ``about`` says what is wrong: the ``rule``, or its ``dtstart``.
    """

    def __init__(self, text: str, *, about: str = "rule") -> None:
        super().__init__(text)
        self.about = about


def parse(text: str) -> dict[str, str]:
    """Return the parts of a recurrence rule by name, upper case.

    Raises RecurrenceProblem naming the part that is wrong and what it may be.
    """
    if not isinstance(text, str):
        raise RecurrenceProblem(f"a rule is a str, not {type(text).__name__}")
    if len(text) > TEXT_SIZE_MAX:
        told = f"the rule has {len(text):,} characters, the limit is {TEXT_SIZE_MAX}"
        raise RecurrenceProblem(told)
    _refuse_cron(text)
    parts: dict[str, str] = {}
    for part in _PREFIX.sub("", text.strip()).split(";"):
        name, separator, value = part.strip().upper().partition("=")
        if not (separator and value):
            raise RecurrenceProblem(
                f"the part {quoted(part)} of the rrule is not of the form NAME=VALUE, such as "
                "FREQ=WEEKLY"
            )
        if name in parts:
            raise RecurrenceProblem(f"{name} is given twice")
        _check_part(name, value)
        parts[name] = value
    _check_whole(parts)
    return parts


def _refuse_cron(text: str) -> None:
    if _CRON.fullmatch(text.strip()):
        raise RecurrenceProblem(
            f"{quoted(text)} is of cron; rules here are of RFC 5545, such as "
            "FREQ=DAILY;BYHOUR=3;BYMINUTE=0 for '0 3 * * *'"
        )


def weeks_max(parts: Mapping[str, str]) -> int:
    """Return how many of one weekday there may be where BYDAY counts them: a month, or a year."""
    is_in_month = parts["FREQ"] == "MONTHLY" or "BYMONTH" in parts
    return _WEEKS_IN_MONTH if is_in_month else _WEEKS_IN_YEAR


def until_moment(text: str) -> datetime:
    """Return the naive moment of UNTIL; a mere date lasts until its end."""
    if "T" in text:
        return datetime.strptime(text[:15], "%Y%m%dT%H%M%S")  # noqa: DTZ007  # the caller's zone
    return datetime.combine(datetime.strptime(text, "%Y%m%d"), time.max)  # noqa: DTZ007


def _check_part(name: str, value: str) -> None:
    if name in _RANGES:
        _check_numbers(name, value)
    elif name in _CHECKS:
        _CHECKS[name](name, value)
    else:
        raise RecurrenceProblem(f"{quoted(name)} is not a part of a recurrence rule")


def _check_numbers(name: str, value: str) -> None:
    for text in value.split(","):
        if not _NUMBER.fullmatch(text) or int(text) not in _RANGES[name]:
            raise RecurrenceProblem(f"{name} holds {quoted(text)}, which is out of range")


def _check_frequency(name: str, value: str) -> None:
    if value == "SECONDLY":
        raise RecurrenceProblem(f"{name}=SECONDLY is too frequent; MINUTELY is the limit")
    if value not in FREQUENCIES:
        raise RecurrenceProblem(
            f"{name} must be one of {', '.join(FREQUENCIES)}, not {quoted(value)}"
        )


def _check_amount(name: str, value: str) -> None:
    limit = INTERVAL_MAX if name == "INTERVAL" else COUNT_MAX
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= limit):
        raise RecurrenceProblem(f"{name} must be 1 to {limit}, not {quoted(value)}")


def _check_weekdays(name: str, value: str) -> None:
    if not all(_WEEKDAY.fullmatch(day) for day in value.split(",")):
        raise RecurrenceProblem(f"{name} takes weekdays, MO to SU, not {quoted(value)}")


def _check_week_start(name: str, value: str) -> None:
    if not (value.isalpha() and _WEEKDAY.fullmatch(value)):
        raise RecurrenceProblem(f"{name} must be one weekday, MO to SU, not {quoted(value)}")


def _check_until(name: str, value: str) -> None:
    if _UNTIL.fullmatch(value):
        try:
            until_moment(value)
        except ValueError:
            pass
        else:
            return
    raise RecurrenceProblem(
        f"{name} must look like 20261231 or 20261231T235959Z, not {quoted(value)}"
    )


_CHECKS = {
    "FREQ": _check_frequency,
    "INTERVAL": _check_amount,
    "COUNT": _check_amount,
    "UNTIL": _check_until,
    "BYDAY": _check_weekdays,
    "WKST": _check_week_start,
}


def _check_whole(parts: dict[str, str]) -> None:
    if "FREQ" not in parts:
        raise RecurrenceProblem("a rule needs FREQ")
    if "COUNT" in parts and "UNTIL" in parts:
        raise RecurrenceProblem("COUNT and UNTIL exclude each other")
    _check_interval(parts)
    _check_times(parts)
    _check_ordinals(parts)
    _check_positions(parts)
    _check_day_exists(parts)
    if parts["FREQ"] in WITHIN_DAYS and not parts.keys().isdisjoint({"BYWEEKNO", "BYSETPOS"}):
        raise RecurrenceProblem("BYWEEKNO and BYSETPOS do not go with HOURLY and MINUTELY")


def _check_interval(parts: dict[str, str]) -> None:
    limit = INTERVALS_MAX.get(parts["FREQ"], INTERVAL_MAX)
    if int(parts.get("INTERVAL", "1")) > limit:
        raise RecurrenceProblem(f"INTERVAL must be 1 to {limit} with {parts['FREQ']}")


def _check_times(parts: dict[str, str]) -> None:
    """Refuse what is SECONDLY by another name, and what makes a year hard to search."""
    if "," in parts.get("BYSECOND", ""):
        raise RecurrenceProblem("BYSECOND takes one number; MINUTELY is the limit")
    if parts["FREQ"] not in WITHIN_DAYS and (times := _times(parts)) > TIMES_MAX:
        raise RecurrenceProblem(
            f"BYHOUR and BYMINUTE make {times} times a day, the limit is {TIMES_MAX}; use HOURLY "
            "or MINUTELY"
        )


def _check_ordinals(parts: dict[str, str]) -> None:
    """Check the numbers of weekdays, such as the 2 of 2MO."""
    numbers = [int(day[:-2]) for day in parts.get("BYDAY", "MO").split(",") if not day.isalpha()]
    if numbers and parts["FREQ"] not in ("MONTHLY", "YEARLY"):
        raise RecurrenceProblem("BYDAY takes numbers with MONTHLY and YEARLY only")
    limit = weeks_max(parts)
    if any(not 1 <= abs(number) <= limit for number in numbers):
        raise RecurrenceProblem(f"BYDAY numbers weekdays 1 to {limit}, not {parts['BYDAY']}")


def _check_day_exists(parts: dict[str, str]) -> None:
    """Refuse what dateutil would look for, day by day, until the end of its time: 30 February.

    It ends with the year 9999, and the 28 years before hold every kind of year that there is.
    """
    days = {name: parts[name] for name in DAY_PARTS if name in parts}
    if not days or parts["FREQ"] in ("MONTHLY", "YEARLY"):
        return
    text = ";".join(f"{name}={value}" for name, value in {"FREQ": "YEARLY", **days}.items())
    if next(iter(rrulestr(text, dtstart=datetime(MAXYEAR - 27, 1, 1))), None) is None:  # noqa: DTZ001  # local
        raise RecurrenceProblem("it never occurs: there is no such day")


def _check_positions(parts: dict[str, str]) -> None:
    """Refuse a place that no day or week has; in years and months it is soon found out."""
    days = {"DAILY": 1, "WEEKLY": 7}.get(parts["FREQ"])
    if days is None or "BYSETPOS" not in parts:
        return
    limit = days * _times(parts)
    if min(abs(int(position)) for position in parts["BYSETPOS"].split(",")) > limit:
        raise RecurrenceProblem(f"it never occurs: BYSETPOS must be at most {limit} here")


def _times(parts: dict[str, str]) -> int:
    """Return how many times a day has."""
    return math.prod(len(set(parts.get(name, "0").split(","))) for name in ("BYHOUR", "BYMINUTE"))
