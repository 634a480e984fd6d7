import sys
from io import StringIO

import pytest
from django.core.management.base import CommandError, OutputWrapper
from django.core.management.color import make_style

from kanthorq_django.management.console import Console


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


class Printed(Console):
    """A console whose output can be read."""

    def __init__(self, kind: type[StringIO]) -> None:
        self.out, self.err = kind(), kind()
        super().__init__(OutputWrapper(self.out), OutputWrapper(self.err), make_style("light"))


@pytest.fixture
def piped() -> Printed:
    return Printed(StringIO)


@pytest.fixture
def terminal() -> Printed:
    return Printed(Terminal)


def test_notes_and_warnings_never_mix_with_the_data(piped: Printed):
    piped.line("data")
    piped.note("note")
    piped.warn("warning")

    assert piped.out.getvalue() == "data\n"
    assert piped.err.getvalue() == "note\nwarning\n"


def test_columns_have_the_width_of_their_longest_cell(piped: Printed):
    piped.table(("NAME", "COUNT"), [("a", "1"), ("longer", "1,000,000")], numbers={"COUNT"})

    assert piped.out.getvalue().splitlines() == [
        "NAME        COUNT",
        "a               1",
        "longer  1,000,000",
    ]


def test_only_a_terminal_gets_colours(piped: Printed, terminal: Printed):
    for console in (piped, terminal):
        console.heading("text")

    assert piped.out.getvalue() == "text\n"
    assert terminal.out.getvalue() == "\x1b[36;1mtext\x1b[0m\n"


def test_only_a_terminal_gets_a_progress_bar(piped: Printed, terminal: Printed):
    for console in (piped, terminal):
        console.progress(1, 2, "half")
        console.progress(3, 2, "more than expected")
        console.progress(5, None, "5 events")
        console.progress(0, 0, "none")
        console.end_progress()

    assert piped.err.getvalue() == ""
    assert terminal.err.getvalue().split("\r") == [
        "",
        f"[{'#' * 15}{' ' * 15}]  50% half",
        f"[{'#' * 30}] 100% more than expected",
        "5 events",
        f"[{'#' * 30}] 100% none\n",
    ]


@pytest.mark.parametrize("answer", ["y", "Y", "yes", " YES \n"])
def test_yes_is_an_answer(answer: str, piped: Printed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))

    piped.confirm("Sure?")

    assert piped.out.getvalue() == ""
    assert piped.err.getvalue() == "Sure? [y/N] "


@pytest.mark.parametrize("answer", ["n", "", "\n", "yess", "no\nyes"])
def test_everything_else_is_no(answer: str, piped: Printed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))

    with pytest.raises(CommandError, match=r"Nothing was changed\."):
        piped.confirm("Sure?")


@pytest.mark.parametrize("stdin", [None, StringIO("yes")])
def test_without_a_terminal_nobody_is_asked(
    stdin: StringIO | None, piped: Printed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", stdin)

    with pytest.raises(CommandError, match="add --yes, or --dry-run"):
        piped.confirm("Sure?")

    assert piped.err.getvalue() == ""
