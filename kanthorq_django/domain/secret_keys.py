"""Which names are those of secrets, however they are written."""

import functools
import re
from collections.abc import Callable

IsSecret = Callable[[str], bool]

_NAME_SIZE_MAX = 200  # characters of a name that are looked at
_PLAIN_WORD_SIZE = 5  # letters from which a key is not a chance part of other words
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@functools.lru_cache(maxsize=8)
def matcher(keys: tuple[str, ...]) -> IsSecret:
    """Return what tells whether a name is one of ``keys``, alone or among other words."""
    wanted = [words for key in keys if (words := _words(key))]
    marks = [f"_{'_'.join(words)}{plural}_" for words in wanted for plural in ("", "s")]
    compact = {"".join(words) for words in wanted}

    @functools.lru_cache(maxsize=1_024)
    def is_secret(name: str) -> bool:
        words = _words(name)
        joined = f"_{'_'.join(words)}_"
        return "".join(words) in compact or any(mark in joined for mark in marks)

    return is_secret


def first_mention(data: bytes, keys: tuple[str, ...]) -> int | None:
    """Return where the first of ``keys`` ends in bytes that are no text, in UTF-16 too.

    None if there is none. It takes rather too much for a mention than too little.
    """
    places = [place for place, byte in enumerate(data) if byte]
    letters = bytes(data[place] for place in places).decode("latin-1")
    found = _mention(keys).search(letters)
    return None if found is None else places[found.end() - 1] + 1


@functools.lru_cache(maxsize=8)
def _mention(keys: tuple[str, ...]) -> re.Pattern[str]:
    patterns = []
    for words in filter(None, map(_words, keys)):
        pattern = r"[\W_]?".join(map(re.escape, words))
        is_plain = len("".join(words)) >= _PLAIN_WORD_SIZE
        patterns.append(pattern if is_plain else rf"(?<![a-z]){pattern}s?(?![a-z])")
    return re.compile("|".join(patterns) or r"(?!)", re.IGNORECASE | re.ASCII)


def _words(name: str) -> list[str]:
    spaced = _WORD_BORDER.sub("_", name[:_NAME_SIZE_MAX])
    return [word for word in re.split(r"[\W_]+", spaced.casefold()) if word]
