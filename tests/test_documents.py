"""The Python in README.md and docs/ runs as it is printed, links lead on, tables are complete.

Each block with the imports that stand in it, those of the guide with its first block beside.
"""

import builtins
import re
import symtable
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock
from uuid import uuid4

import pytest
from cryptography.fernet import Fernet
from django.apps import apps
from django.conf import settings
from django.test import TestCase

from kanthorq_django import subscribe
from kanthorq_django.conf import problems
from kanthorq_django.subscribers import sync

HOME = Path(settings.BASE_DIR)
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
LINKING = [*PAGES, *(HOME / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))]
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What needs more than a test has here, such as a second database, is shown and not run.
SHOWN = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")

# What belongs to the reader's project.
STAND_INS: dict[str, Any] = {
    "Booking": Mock(),
    "Click": Mock(),
    "Order": Mock(**{"objects.create.return_value.pk": 17}),
    "body": {"order": 17},
    "chunks": Mock(),
    "event_id": uuid4(),
    "other_id": uuid4(),
    "payment": SimpleNamespace(pk=4711),
    "rows": [{"order": 17}, {"order": 18}],
    "task_ids": [17],
    "total": 3,
    "write": Mock(),
}
CONSUMERS = {"refunds": "orders", "emails": "orders", "export": "exports", "reports": "reports"}


class Block(NamedTuple):
    page: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(fence: re.Pattern[str]) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in fence.finditer(text):
            line = text.count("\n", 0, found.start()) + 2
            yield Block(page.name, line, found[1])


BLOCKS = list(blocks(FENCED))


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, db: None) -> dict[str, Any]:
    """Return the names of a project that has declared some consumers of its own."""
    monkeypatch.setitem(sys.modules, "prometheus_client", Mock())
    monkeypatch.setenv("KANTHORQ_BODY_KEYS", Fernet.generate_key().decode())
    for name, stream in CONSUMERS.items():
        subscribe(">", stream=stream, consumer=name)(lambda message: None)
    sync(CONSUMERS)
    return {"__name__": "reader", **STAND_INS}


def run(block: Block, names: dict[str, Any]) -> None:
    # So that a traceback names the line of the page.
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
    exec(code, names)  # noqa: S102  # that is what readers do


def missing(scope: symtable.SymbolTable, names: dict[str, Any]) -> set[str]:
    """Return what functions in ``scope`` would look for in vain when they are called."""
    own: set[str] = set()
    for inner in scope.get_children():
        own |= {each.get_name() for each in inner.get_symbols() if each.is_global()}
        own |= missing(inner, names)
    return {name for name in own if name not in names and not hasattr(builtins, name)}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs_as_it_is_printed(block: Block, reader: dict[str, Any]):
    run_imports(block, reader)

    run(block, reader)

    assert not missing(symtable.symtable(block.code, block.page, "exec"), reader)
    assert not list(problems(reader.get("KANTHORQ", {})))
    for value in reader.values():
        if isinstance(value, type) and value.__base__ is TestCase:
            check(value)


@pytest.mark.parametrize("block", list(blocks(SHOWN)), ids=str)
def test_a_block_that_is_only_shown_has_the_imports_that_it_needs(
    block: Block, reader: dict[str, Any]
):
    run_imports(block, reader)

    assert not missing(symtable.symtable(block.code, block.page, "exec"), reader)


def run_imports(block: Block, names: dict[str, Any]) -> None:
    if block.page == "guide.md":
        run(next(each for each in BLOCKS if each.page == "guide.md"), names)


def check(case: type[TestCase]) -> None:
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    outcome = unittest.TestResult()
    tests.run(outcome)
    assert outcome.testsRun
    assert outcome.wasSuccessful(), [trouble for _, trouble in outcome.failures + outcome.errors]


def test_every_stand_in_is_needed():
    printed = "\n".join(block.code for block in BLOCKS)
    assert [name for name in STAND_INS if not re.search(rf"\b{name}\b", printed)] == []


def test_the_table_of_indexes_leaves_none_out():
    page = (HOME / "docs" / "how-it-works.md").read_text()
    models = apps.get_app_config("kanthorq_django").get_models()
    kept = [each for model in models for each in (*model._meta.indexes, *model._meta.constraints)]
    columns = {f"({', '.join(each.fields)})" for each in kept if hasattr(each, "fields")}
    assert set(re.findall(r"^\| \w+ (\([^)]+\))", page, re.MULTILINE)) == columns


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page: Path):
    dead = [
        f"{path}#{anchor}"
        for path, anchor in LINK.findall(prose(page))
        if not (target := page.parent / path if path else page).exists()
        or (anchor and anchor not in anchors(target))
    ]
    assert dead == []


def prose(page: Path) -> str:
    return ANY_CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of the headings of ``page``."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
