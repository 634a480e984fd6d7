"""How many there are, in words: of one and of more, and of more than are named."""

from collections.abc import Sequence


def plural(count: int, one: str, more: str = "") -> str:
    """Return the noun that stands behind ``count``; ``more`` if another one than with an ``s``."""
    return one if count == 1 else more or f"{one}s"


def counted(count: int, one: str, more: str = "") -> str:
    """Return ``1 task`` or ``2,000 tasks``."""
    return f"{count:,} {plural(count, one, more)}"


def listed(names: Sequence[str], *, shown_max: int, count: int | None = None) -> str:
    """Return at most ``shown_max`` of ``names``, the first of ``count``, and how many others."""
    shown = names[:shown_max]
    others = (len(names) if count is None else count) - len(shown)
    more = f" and {counted(others, 'other')}" if others > 0 else ""
    return f"{', '.join(shown)}{more}"
