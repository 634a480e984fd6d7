"""Where the text of a statement comes from: files that may be gone when it is needed."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

from kanthorq_django import sql

NAMES = sorted(file.stem for file in Path(sql.__file__).parent.glob("*.sql"))


def test_statements_are_read_no_more_once_they_are_imported(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    sql.load.cache_clear()
    for module in (importlib.resources, sql):
        monkeypatch.setattr(module, "files", refuse)

    texts = [sql.load(name) for name in NAMES]

    assert len(texts) > 40
    assert all(texts)


def test_they_are_importable_without_settings():
    program = "from kanthorq_django import sql; assert sql.load('publish')"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_each_begins_with_what_it_does(name: str):
    assert sql.load(name).startswith("-- ")
