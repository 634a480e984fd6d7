"""Tells the story of a run, line by line, in 80 columns."""

import textwrap
import time
from typing import Protocol

WIDTH = 80
LABEL, CELL = 14, 12  # columns of a row's name and of each of its cells


class Page(Protocol):
    """Where lines are written, such as the standard output of a command."""

    def write(self, msg: str = "") -> object: ...

    def flush(self) -> None: ...


class Narrator:
    """Writes what happens, with the seconds since it began, and tables."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._began_at = time.monotonic()

    def line(self, text: str = "") -> None:
        self._page.write(text)
        self._page.flush()  # into a pipe as well, as it happens

    def heading(self, text: str, *columns: str) -> None:
        """Begin a section, with names of columns if there are any."""
        self.line()
        names = "".join(f"{column:>{CELL}}" for column in columns)
        self.line(f"{text:<{LABEL + 2}}{names}".rstrip())

    def tell(self, text: str) -> None:
        """Write what has just happened."""
        clock = f"{time.monotonic() - self._began_at:6.1f} s  "
        lines = textwrap.wrap(text, WIDTH - len(clock))
        self.line(clock + f"\n{'':{len(clock)}}".join(lines))

    def fact(self, label: str, value: object) -> None:
        """Write a value and its name."""
        self.line(f"  {label:<{LABEL}}{value}")

    def row(self, label: str, *cells: object) -> None:
        """Write cells in columns; whole numbers with commas, and a dot for none."""
        self.line(f"  {label:<{LABEL}}" + "".join(f"{_cell(cell):>{CELL}}" for cell in cells))

    def number(self, label: str, count: int, remark: str) -> None:
        """Write a number and what it is about."""
        lines = textwrap.wrap(remark, WIDTH - LABEL - CELL - 4)
        self.line(
            f"  {label:<{LABEL}}{count:>{CELL},}  " + f"\n{'':{LABEL + CELL + 4}}".join(lines)
        )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}" if value else "."
    return str(value)
