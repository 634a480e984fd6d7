"""What may name a stream, a consumer or a schedule."""

import functools
import re

NAME_SIZE_MAX = 128  # characters
_NAME = re.compile(r"[^\W_][\w.:-]*", re.ASCII)


def name_problem(name: object) -> str | None:
    """Return what is wrong with ``name`` in words, or None when it may be used."""
    if not isinstance(name, str):
        return f"it must be a str, not {type(name).__name__}"
    return _text_problem(name)


@functools.lru_cache(maxsize=256)  # publishers repeat themselves
def _text_problem(name: str) -> str | None:
    if len(name) > NAME_SIZE_MAX:
        return f"it has {len(name)} characters, the limit is {NAME_SIZE_MAX}"
    if not _NAME.fullmatch(name):
        return "start with a letter or digit of ASCII, go on with those, '_', '-', '.' or ':'"
    return None
