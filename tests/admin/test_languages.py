"""The catalogues hold what the sources mark, say it with the same values, and are shown."""

import ast
import gettext
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management.base import CommandError
from django.test import Client
from django.utils import timezone
from django.utils.translation import templatize

import kanthorq_django
from kanthorq_django import schedule
from kanthorq_django.models import Schedule, Task, TaskState
from tests.admin.conftest import MakeClient
from tests.admin.pages import ask_for_all, page, text_of, tick, told
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

APP = Path(kanthorq_django.__file__).parent
CATALOGUES = sorted((APP / "locale").glob("*/LC_MESSAGES/django.po"))
MARKS = {"_": 1, "gettext": 1, "gettext_lazy": 1, "ngettext": 2, "ngettext_lazy": 2}
LITERAL = r"u?('(?:[^'\\]|\\.)*')"
PLACEHOLDER = re.compile(r"%(?:\(\w+\))?[a-z]|\{\w*\}|%%|^\s|\s$")

# A marked text, with its plural if it has one.
Ids = tuple[str, ...]


def marked_in_code(path: Path) -> Iterator[Ids]:
    """Yield what is marked; fail for what xgettext would not find."""
    tree = ast.parse(path.read_text())
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    hidden = {id(inner) for node in formatted for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in MARKS:
            continue
        place = f"{path.name}:{node.lineno}"
        assert id(node) not in hidden, f"{place} marks a text inside an f-string"
        texts = [ast.unparse(text) for text in node.args[: MARKS[node.func.id]]]  # type: ignore[attr-defined]
        assert all(text[0] in "'\"" for text in texts), f"{place} marks what is no literal"
        yield tuple(map(ast.literal_eval, texts))


def marked_in_template(path: Path) -> Iterator[Ids]:
    for found in re.findall(rf"gettext\({LITERAL}(?:, {LITERAL})?", templatize(path.read_text())):
        yield tuple(ast.literal_eval(text) for text in found if text)


def marked() -> set[Ids]:
    code = (ids for path in APP.rglob("*.py") for ids in marked_in_code(path))
    templates = (ids for path in APP.rglob("*.html") for ids in marked_in_template(path))
    return {*code, *templates}


def translations(path: Path) -> dict[Ids, list[str]]:
    """Return the texts of a catalogue with theirs, but those that are empty or in doubt."""
    found = {}
    for entry in path.read_text().split("\n\n")[1:]:  # after the head
        words: dict[str, list[str]] = {"msgid": [], "msgstr": []}
        for word, lines in re.findall(r'^(msgid|msgstr)\S* ((?:".*"\n?)+)', entry, re.MULTILINE):
            words[word].append("".join(map(ast.literal_eval, lines.splitlines())))
        if all(words["msgstr"]) and "#, fuzzy" not in entry:
            found[tuple(words["msgid"])] = words["msgstr"]
    return found


@pytest.fixture(params=CATALOGUES, ids=lambda path: path.parts[-3])
def catalogue(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_marked_text_is_translated_and_no_other(catalogue: Path):
    known = translations(catalogue).keys()
    assert known - marked() == marked() - known == set()


def test_translations_hold_the_values_of_what_they_translate(catalogue: Path):
    for ids, texts in translations(catalogue).items():
        for form, text in enumerate(texts):
            meant = ids[0] if form == 0 else ids[-1]
            assert sorted(PLACEHOLDER.findall(text)) == sorted(PLACEHOLDER.findall(meant)), text


def test_what_is_read_is_what_was_written(catalogue: Path):
    with catalogue.with_suffix(".mo").open("rb") as compiled:
        read: Any = gettext.GNUTranslations(compiled)
    written: dict[Any, str] = {}
    for ids, texts in translations(catalogue).items():
        forms = {(ids[0], form): text for form, text in enumerate(texts)}
        written |= forms if len(ids) > 1 else {ids[0]: texts[0]}
    del read._catalog[""]
    assert read._catalog == written


def weekly() -> Schedule:
    monday = datetime(2126, 1, 7, 9, tzinfo=UTC)
    return schedule(
        "weekly", rrule="FREQ=WEEKLY", dtstart=monday, subject="report.weekly", stream="reports"
    )


@pytest.fixture
def german(settings: Any, db: None) -> None:
    settings.LANGUAGE_CODE = "de"


@pytest.mark.usefixtures("german")
class TestGerman:
    def test_a_list(self, operator: Client):
        ago = timezone.now() - timedelta(hours=2)
        TaskFactory.create(state=TaskState.PENDING)
        TaskFactory.create(state=TaskState.DISCARDED)
        TaskFactory.create(state=TaskState.RETRYABLE, schedule_at=ago, cancel_attempt_count=1)

        shown = text_of(operator.get(page("task_changelist")))

        for text in (
            "Nach Consumer",
            "Ausgewählte Tasks abbrechen und laufende anhalten",
            "Grund:",
            "ID Status Subject Consumer Versuche Zeitpunkt",
            "Ausstehend",
            "sobald freigegeben",
            "fällig vor 2 Stunden",
            ", Abbruch 1 / 16",
            "Eine Event-ID, sonst ein Ressourcenschlüssel",
        ):
            assert text in shown

    def test_a_question_about_one_and_about_several(self, operator: Client):
        one, two = TaskFactory.create_batch(2, state=TaskState.COMPLETED)

        asked = text_of(tick(operator, "reset", [one]))
        assert "Es geht um 1 Task. Endgültige Tasks laufen sofort wieder" in asked
        assert "Abgeschlossen 1 Zurücksetzen" in asked
        assert "Es geht um 2 Tasks." in text_of(tick(operator, "reset", [one, two]))
        asked_for_all = text_of(ask_for_all(operator, "reset"))
        assert "2 Tasks passen, auch auf Seiten, die Sie nicht gesehen haben." in asked_for_all

    def test_what_came_of_one_and_of_several(self, operator: Client):
        tasks = TaskFactory.create_batch(4, state=TaskState.PENDING)
        Task.objects.filter(pk=tasks[3].pk).cancel()

        ((_, one),) = told(tick(operator, "cancel", tasks[:1]))
        assert one.startswith("Abbrechen: 1 Task aktualisiert. Geändert, nach Event: ")
        *_, (_, several) = told(tick(operator, "cancel", tasks[1:]))
        assert several.startswith("Abbrechen: 2 Tasks aktualisiert, 1 unverändert. ")
        assert "(Abgebrochen)" in several

    def test_numbers_and_moments(self, client_of: MakeClient):
        consumer = ConsumerFactory.create()
        EventFactory.create_batch(2, stream=consumer.stream)
        kept = weekly()
        writer = client_of("view_schedule")

        assert "2 Events, das älteste" in text_of(writer.get(page("consumer_changelist")))
        written = text_of(writer.get(page("schedule_change", kept.pk)))
        assert "Montag, 7. Januar 2126, 09:00:00 UTC" in written

    def test_the_command_line_stays_english(self):
        weekly()

        assert "publish the last one" in kanthorq("schedules", "show", "weekly").out
        with pytest.raises(CommandError, match="There is no schedule 'daily' in"):
            kanthorq("schedules", "show", "daily")
