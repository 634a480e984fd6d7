"""Which names are those of secrets, however they are written."""

import functools
import re
from collections.abc import Callable
from string import digits

IsSecret = Callable[[str], bool]

_NAME_SIZE_MAX = 200  # characters of a name that are looked at
_PLAIN_WORD_SIZE = 5  # letters; a shorter key may be part of other words by chance
_NOTHING = r"(?!)"  # a pattern that nothing matches
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@functools.lru_cache(maxsize=8)
def matcher(keys: tuple[str, ...]) -> IsSecret:
    """Return what tells whether a name is one of ``keys``, alone or among other words.

    Each word may be numbered, as ``password2``, and a key that is no chance part of other words
    may end one, as in ``PGPASSWORD``, which shows no border.
    """
    wanted = [words for key in keys if (words := _words(key))]
    mark = re.compile(rf"(?:{'|'.join(map(_mark, wanted)) or _NOTHING})s?[0-9]*_")
    compact = {"".join(words) for words in wanted}

    @functools.lru_cache(maxsize=1_024)
    def is_secret(name: str) -> bool:
        words = _words(name)
        whole = "".join(words)
        return (
            mark.search(f"_{'_'.join(words)}_") is not None
            or whole in compact
            or whole.rstrip(digits) in compact
        )

    return is_secret


def _mark(words: list[str]) -> str:
    pattern = "[0-9]*_?".join(map(re.escape, words))
    return pattern if _is_plain(words) else f"_{pattern}"


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
        pattern = r"[0-9]*[\W_]?".join(map(re.escape, words))
        patterns.append(pattern if _is_plain(words) else rf"(?<![a-z]){pattern}s?(?![a-z])")
    return re.compile("|".join(patterns) or _NOTHING, re.IGNORECASE | re.ASCII)


def _is_plain(words: list[str]) -> bool:
    return len("".join(words)) >= _PLAIN_WORD_SIZE


def _words(name: str) -> list[str]:
    spaced = _WORD_BORDER.sub("_", name[:_NAME_SIZE_MAX])
    return [word for word in re.split(r"[\W_]+", spaced.casefold()) if word]
