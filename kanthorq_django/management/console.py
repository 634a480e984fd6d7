"""What a verb prints: data on stdout, everything said about it on stderr.

So a pipe gets the data alone, whether a person is watching or not. Whatever is in the data, a
line stays one line, and nothing in it steers a terminal. What cannot be printed stops no verb.
"""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from django.core.management.base import CommandError, OutputWrapper
from django.core.management.color import Style
from django.core.serializers.json import DjangoJSONEncoder

from kanthorq_django.management.output import Output

GAP = "  "
BAR_WIDTH = 30


class Console:
    """Where a verb prints and asks; colours and the progress bar are for terminals only."""

    def __init__(self, stdout: OutputWrapper, stderr: OutputWrapper, style: Style) -> None:
        self._stdout = Output(stdout)
        self._stderr = Output(stderr)
        self._style = style

    def line(self, text: str, *, painted: str = "") -> None:
        """Print one line of data, behind what ``paint()`` has made of its beginning."""
        self._stdout.write(painted + _fit(text, self._stdout))

    def note(self, text: str) -> None:
        """Say something about the data, on stderr."""
        self._stderr.write(_fit(text, self._stderr))

    def warn(self, text: str) -> None:
        """Say something that needs attention, on stderr."""
        self._stderr.write(self.paint("WARNING", text, self._stderr))

    def json(self, value: Any) -> None:
        """Print ``value`` as JSON, in ASCII, so that any encoding of stdout can take it."""
        self._stdout.write(json.dumps(value, cls=DjangoJSONEncoder, indent=2))

    def pieces(self, texts: Iterable[str]) -> None:
        """Print ``texts``, which are ASCII, one after the other as one piece of data."""
        for text in texts:
            self._stdout.write(text, ending="")
        self._stdout.write("")

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        numbers: Collection[str] = (),
    ) -> None:
        """Print aligned columns under ``headers``; those named in ``numbers`` to the right."""
        shown = [[_printable(cell) for cell in row] for row in rows]
        columns = [[header, *(row[at] for row in shown)] for at, header in enumerate(headers)]
        padded = [
            [_pad(cell, max(map(len, column)), is_number=column[0] in numbers) for cell in column]
            for column in columns
        ]
        head, *body = zip(*padded, strict=True)
        self.heading(GAP.join(head).rstrip())
        for cells in body:
            self.line(GAP.join(cells).rstrip())

    def heading(self, text: str) -> None:
        self._stdout.write(self.paint("MIGRATE_HEADING", text))

    def finish(self) -> OSError | None:
        """Write out all data; return what kept any of it from being written."""
        self._stdout.flush()
        return self._stdout.loss

    def paint(self, role: str, text: str, output: Output | None = None) -> str:
        """Return ``text`` in the colour of ``role``, or as it is when nobody would see it."""
        target = output or self._stdout
        fitting = _fit(text, target)
        return str(getattr(self._style, role)(fitting)) if target.isatty() else fitting

    def confirm(self, question: str) -> None:
        """Ask a yes-or-no question. Raises CommandError unless the answer is yes.

        Without a terminal nobody can answer, so that is an error too.
        """
        self.require_answers()
        self._stderr.write(f"{question} [y/N] ", ending="")
        self._stderr.flush()
        # A question that nobody saw is not answered.
        answer = "" if self._stderr.loss else sys.stdin.readline()
        if answer.strip().lower() not in {"y", "yes"}:
            # As Django's collectstatic does it: no script takes a no for done.
            raise CommandError("Nothing was changed.")

    def require_answers(self) -> None:
        """Raise CommandError unless a person can answer, before work is done in vain."""
        if not is_interactive():
            raise CommandError("Nobody can be asked without a terminal; add --yes, or --dry-run.")

    def progress(self, done: int, total: int | None, text: str) -> None:
        """Redraw the progress on stderr, as a bar if there is a ``total``; for terminals only."""
        if not self._stderr.isatty():
            return
        bar = "" if total is None else _bar(done / total if total else 1)
        self._stderr.write(f"\r{bar}{text}", ending="")
        self._stderr.flush()

    def end_progress(self) -> None:
        if self._stderr.isatty():
            self._stderr.write("")


def is_interactive() -> bool:
    """Tell whether a person can answer on stdin; it is None when it was closed."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _bar(share: float) -> str:
    filled = "#" * round(min(share, 1) * BAR_WIDTH)
    return f"[{filled:<{BAR_WIDTH}}] {min(share, 1):4.0%} "


def _pad(cell: str, width: int, *, is_number: bool) -> str:
    return cell.rjust(width) if is_number else cell.ljust(width)


def _fit(text: str, output: Output) -> str:
    """Escape also what the encoding lacks, so that a subject never breaks the output."""
    return _printable(text).encode(output.encoding, "backslashreplace").decode(output.encoding)


def _printable(text: str) -> str:
    """Escape what would begin a line, turn text around or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
