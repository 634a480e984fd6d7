"""A chart of a run as SVG: one bar per contestant and work, relative to the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from benchmarks.contest import Result
from benchmarks.measurement import Series
from benchmarks.report import figure, reference
from benchmarks.works.work import Metric

WIDTH, LABEL_WIDTH, FIGURE_WIDTH = 860, 260, 150
BAR_HEIGHT, GAP, TITLE_HEIGHT, MARGIN = 18, 5, 34, 14
OURS, THEIRS, INK, LINE = "#0c4b33", "#a9c7b8", "#222", "#888"


def write(results: Sequence[Result], path: Path) -> None:
    """Draw the first metric of each work."""
    y = MARGIN
    parts: list[str] = []
    for result in results:
        drawn, y = _work(result, y)
        parts += drawn
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-family="system-ui, sans-serif" font-size="12">'
    )
    background = f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>'
    path.write_text("\n".join([head, background, *parts, "</svg>"]) + "\n")


def _work(result: Result, y: int) -> tuple[list[str], int]:
    metric = result.comparison.metrics[0]
    series = [one for one in result.series if one.metric == metric.name and one.known]
    if not series:
        return [], y
    if not result.comparison.is_sequence:
        series.sort(key=lambda one: one.median, reverse=metric.is_better_when_higher)
    direction = "more" if metric.is_better_when_higher else "less"
    unit = f" in {metric.unit}" if metric.unit else ""
    title = f"{result.comparison.title}: {metric.name}{unit}, {direction} is better"
    parts = [_text(MARGIN, y + 20, title, weight="bold")]
    y += TITLE_HEIGHT
    parts += _bars(result, metric, series, y)
    return parts, y + len(series) * (BAR_HEIGHT + GAP) + GAP


def _bars(result: Result, metric: Metric, series: Sequence[Series], y: int) -> Iterator[str]:
    longest = max(max(one.known) for one in series)
    compared = reference(result, metric)
    room = WIDTH - LABEL_WIDTH - FIGURE_WIDTH - MARGIN
    for index, one in enumerate(series):
        top = y + index * (BAR_HEIGHT + GAP)
        length = room * one.median / longest if longest else 0
        ratio = one.ratio_to(compared) if compared else math.nan
        said = figure(one.median) + ("" if math.isnan(ratio) else f"  ({ratio:.2f} x)")
        color = OURS if "kanthorq" in one.label or result.comparison.is_sequence else THEIRS
        yield _text(LABEL_WIDTH - 8, top + 13, one.label, anchor="end")
        yield (
            f'<rect x="{LABEL_WIDTH}" y="{top}" width="{length:.1f}" height="{BAR_HEIGHT}" '
            f'fill="{color}"/>'
        )
        yield from _whisker(one, room / longest if longest else 0, top)
        end = LABEL_WIDTH + room * max(one.known) / longest if longest else LABEL_WIDTH
        yield _text(max(end, LABEL_WIDTH + length) + 8, top + 13, said)


def _whisker(one: Series, scale: float, top: int) -> Iterator[str]:
    """From the smallest to the largest round."""
    left, right = (LABEL_WIDTH + scale * found(one.known) for found in (min, max))
    middle = top + BAR_HEIGHT / 2
    yield (
        f'<path d="M{left:.1f} {middle}H{right:.1f}M{left:.1f} {middle - 4}v8'
        f'M{right:.1f} {middle - 4}v8" stroke="{LINE}" fill="none"/>'
    )


def _text(
    x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{INK}">{escape(content)}</text>'
    )
