"""Puts the tables of a run into a Markdown file, between the marks of each work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Result
from benchmarks.report import table

BLOCK = "<!-- bench:{name} -->{content}<!-- /bench:{name} -->"


def update(path: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    """Replace the blocks of the works that were run; others, and all else, stay as they are."""
    text = path.read_text()
    for result in results:
        name = result.comparison.name
        # The document has headings of its own.
        content = table(result).split("\n", 2)[2].strip()
        stamp = f"*{about['at'][:10]}, {len(result.series[0].values)} rounds*"
        text = _replaced(text, name, f"\n{content}\n\n{stamp}\n")
    path.write_text(text)


def _replaced(text: str, name: str, content: str) -> str:
    pattern = re.compile(BLOCK.format(name=re.escape(name), content=".*?"), re.DOTALL)
    block = BLOCK.format(name=name, content=content)
    return pattern.sub(lambda _: block, text)
