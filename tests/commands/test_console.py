import errno
import sys
from io import StringIO
from pathlib import Path
from typing import TextIO

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError, OutputWrapper
from django.core.management.color import make_style

from kanthorq_django.management.console import Console
from kanthorq_django.management.output import Output
from tests.commands.console import Terminal


class Broken(Terminal):
    """Fails with ``error`` at the second line."""

    error = OSError(errno.ENOSPC, "No space left on device")

    def write(self, text: str) -> int:
        if self.getvalue():
            raise self.error
        return super().write(text)


class Leaving(Broken):
    error = BrokenPipeError()


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


def test_what_cannot_be_printed_stops_nothing():
    broken = Printed(Broken)

    for text in "first", "second", "third":
        broken.line(text)
        broken.note(text)
        broken.warn(text)

    assert broken.out.getvalue() == broken.err.getvalue() == "first\n"
    assert broken.finish() is Broken.error


def test_what_was_left_in_the_buffer_is_not_written_again_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        output = Output(OutputWrapper(full))
        output.write("text")
        output.flush()
        assert output.loss is not None
        assert output.loss.errno == errno.ENOSPC


def test_a_file_of_the_caller_stays_what_it_was(tmp_path: Path):
    class Failing(StringIO):
        def __init__(self, file: TextIO) -> None:
            super().__init__()
            self.fileno = file.fileno  # type: ignore[method-assign]

        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with (tmp_path / "report").open("w") as report:
        output = Output(OutputWrapper(Failing(report)))
        output.write("text")
        assert output.loss is not None
        report.write("of the caller's own")
    assert (tmp_path / "report").read_text() == "of the caller's own"


def test_a_stream_that_the_program_closed_is_one_that_cannot_be_written(tmp_path: Path):
    report = (tmp_path / "report").open("w")
    report.close()
    output = Output(OutputWrapper(report))
    output.flush()
    assert output.loss is None
    output.write("text")
    assert str(output.loss) == "it is closed"


def test_a_question_that_nobody_saw_is_not_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Terminal("yes"))
    broken = Printed(Broken)
    broken.note("text")

    with pytest.raises(CommandError, match=r"Nothing was changed\."):
        broken.confirm("Sure?")


@pytest.mark.django_db
def test_output_that_was_lost_is_told_once_the_verb_has_ended():
    with pytest.raises(CommandError, match=r"^Stdout could not be written: No space left on"):
        call_command("kanthorq", "stats", stdout=Broken())
    with pytest.raises(SystemExit) as left:
        call_command("kanthorq", "stats", stdout=Leaving())
    assert left.value.code == 1


@pytest.mark.django_db
def test_output_that_was_lost_is_told_beside_why_the_verb_failed():
    said = StringIO()

    with pytest.raises(SystemExit):
        call_command("kanthorq", "health", stdout=Broken(), stderr=said)

    assert said.getvalue() == "Stdout could not be written: No space left on device.\n"
