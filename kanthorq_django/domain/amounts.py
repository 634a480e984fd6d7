"""Counts in sentences: one task or several, and lists that name the first few alone."""

from collections.abc import Sequence


def plural(count: int, one: str, more: str = "") -> str:
    """Return ``one``, or its plural unless ``count`` is 1: ``more`` where an ``s`` does not do."""
    return one if count == 1 else more or f"{one}s"


def counted(count: int, one: str, more: str = "") -> str:
    """Return ``1 task`` or ``2,000 tasks``."""
    return f"{count:,} {plural(count, one, more)}"


def listed(names: Sequence[str], *, shown_max: int, count: int | None = None) -> str:
    """Return the first ``shown_max`` of ``names``, and how many others there are.

    ``count`` says how many there are in all, where ``names`` are not all of them.
    """
    shown = names[:shown_max]
    others = (len(names) if count is None else count) - len(shown)
    more = f" and {counted(others, 'other')}" if others > 0 else ""
    return f"{', '.join(shown)}{more}"
