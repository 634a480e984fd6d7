"""Medians, spreads and ratios of interleaved rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Series:
    """One figure of one contestant, a value per round; None where the round failed."""

    label: str
    metric: str
    values: list[float | None] = field(default_factory=list)
    failure: str = ""

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def median(self) -> float:
        """Return the median of the rounds; NaN if none succeeded."""
        return statistics.median(self.known) if self.known else math.nan

    @property
    def spread(self) -> float:
        """Return the distance from the smallest to the largest, as a part of the median."""
        return (max(self.known) - min(self.known)) / self.median if self.known else math.nan

    def ratio_to(self, other: Series) -> float:
        """Return the median of the ratios within each round, whose noise both shared."""
        pairs = zip(self.values, other.values, strict=False)
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        return statistics.median(ratios) if ratios else math.nan


def find(series: Sequence[Series], label: str, metric: str) -> Series | None:
    """Return the series of a contestant's figure, if it took part."""
    wanted = (label, metric)
    return next((one for one in series if (one.label, one.metric) == wanted), None)
