"""What a run says: a table of each work, and everything as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Result
from benchmarks.measurement import Series, find
from benchmarks.works.work import Goal, Metric

HEADINGS = ("", "metric", "median", "spread", "ratio", "goal")


def table(result: Result) -> str:
    """Return a Markdown table: medians, spreads, and ratios to the reference."""
    rows = [HEADINGS, *_rows(result)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(HEADINGS))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    failures = {series.label: series.failure for series in result.series if series.failure}
    said = [f"{label} failed: {why.splitlines()[0]}" for label, why in failures.items()]
    return "\n".join([f"## {result.comparison.title}", "", *lines, *said, ""])


def write_json(results: Sequence[Result], about: dict[str, Any], path: Path) -> None:
    """Write all values of all rounds, and what they were measured on."""
    content = {"about": about, "works": [_as_dict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_tables(results: Sequence[Result], about: dict[str, Any], path: Path) -> None:
    """Write the tables as Markdown, below what they were measured on."""
    said = ", ".join(f"{name} {value}" for name, value in about.items() if name != "postgresql")
    server = ", ".join(f"{name} {value}" for name, value in about["postgresql"].items())
    path.write_text("\n".join([said, "", f"PostgreSQL: {server}", "", *map(table, results)]))


def reference(result: Result, metric: Metric) -> Series | None:
    """Return what all are compared to: the one that is named, else the best of the others."""
    if result.comparison.reference:
        return find(result.series, result.comparison.reference, metric.name)
    others = [
        series
        for series in result.series
        if series.metric == metric.name and series.known and "kanthorq" not in series.label
    ]
    best = max if metric.is_better_when_higher else min
    return best(others, key=lambda series: series.median, default=None)


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    for metric in result.comparison.metrics:
        compared = reference(result, metric)
        series = [one for one in result.series if one.metric == metric.name and one.known]
        best_first = -1 if metric.is_better_when_higher else 1
        if not result.comparison.is_sequence:
            series.sort(key=lambda one: best_first * one.median)
        for one in series:
            ratio = one.ratio_to(compared) if compared else math.nan
            goal = _goal(result, one)
            yield (
                one.label,
                metric.name,
                f"{figure(one.median)} {metric.unit}".rstrip(),
                f"{one.spread:.0%}",
                "" if math.isnan(ratio) else f"{ratio:.2f}",
                _verdict(goal, ratio, one.median, metric),
            )


def _goal(result: Result, series: Series) -> Goal | None:
    wanted = (series.label, series.metric)
    goals = result.comparison.goals
    return next((goal for goal in goals if (goal.label, goal.metric) == wanted), None)


def _verdict(goal: Goal | None, ratio: float, median: float, metric: Metric) -> str:
    if goal is None:
        return ""
    is_ratio = math.isnan(goal.value)
    found, wanted = (ratio, goal.ratio) if is_ratio else (median, goal.value)
    if math.isnan(found):
        return ""
    is_met = found >= wanted if metric.is_better_when_higher else found <= wanted
    sign = "≥" if metric.is_better_when_higher else "≤"
    unit = "" if is_ratio or not metric.unit else f" {metric.unit}"
    return f"{sign} {wanted:,g}{unit}: {'met' if is_met else 'missed'}"


def figure(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "name": result.comparison.name,
        "title": result.comparison.title,
        "reference": result.comparison.reference,
        "series": [
            {
                "label": one.label,
                "metric": one.metric,
                "median": one.median if one.known else None,
                "values": one.values,
                "failure": one.failure,
            }
            for one in result.series
        ],
    }
