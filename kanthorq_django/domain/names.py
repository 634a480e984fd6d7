"""What may name a stream, a consumer or a schedule, and what a wrong name may have meant."""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence

NAME_SIZE_MAX = 128  # characters
LISTED_MAX = 10  # names in an error message
NEARNESS_MIN = 0.7  # 0 to 1; with 0.6, difflib's default, "nope" would be near "hopper"
_NAME = re.compile(r"[^\W_][\w.:-]*", re.ASCII)


def name_problem(name: object) -> str | None:
    """Return what is wrong with ``name`` in words, or None when it may be used."""
    if not isinstance(name, str):
        return f"it must be a str, not {type(name).__name__}"
    return _text_problem(name)


def similar_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return those of ``known`` that ``name`` may have meant, the nearest first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=NEARNESS_MIN)


def near_names(name: str, known: Sequence[str]) -> str:
    """Return what else ``name`` may have meant, as the end of a sentence."""
    if not known:
        return "there is none yet."
    if near := similar_names(name, known):
        return f"did you mean {' or '.join(map(repr, near))}?"
    listed = ", ".join(map(repr, sorted(known)[:LISTED_MAX]))
    return f"known: {listed}{', …' if len(known) > LISTED_MAX else '.'}"


@functools.lru_cache(maxsize=256)  # publishers repeat themselves
def _text_problem(name: str) -> str | None:
    if len(name) > NAME_SIZE_MAX:
        return f"it has {len(name)} characters, the limit is {NAME_SIZE_MAX}"
    if not _NAME.fullmatch(name):
        return "start with a letter or digit of ASCII, go on with those, '_', '-', '.' or ':'"
    return None
