"""What a soak ends with: figures, and all that was wrong, counted by its kind."""

from collections import Counter
from dataclasses import dataclass, field

from tests.faults.facts import Facts
from tests.faults.invariants import Violation, judge

LOST, DOUBLED, STUCK, LEFT, OTHER = "lost", "doubled", "stuck", "left", "other"
KINDS = (LOST, DOUBLED, STUCK, LEFT, OTHER)
OF_INVARIANT = {
    "I1 delivered once": DOUBLED,
    "I2 no phantoms": DOUBLED,
    "I3 exactly-once effects": DOUBLED,
    "I3 verdicts last": DOUBLED,
    "I4 nothing is stuck": STUCK,
    "I5 one holder": DOUBLED,
    "I6 nothing is left": LEFT,
    "I10 occurrences once": DOUBLED,
}
OF_WORDS = {
    "lost after": LOST,
    "never delivered": LOST,
    "stuck": STUCK,
    "Waited in vain": STUCK,
    "left behind": LEFT,
}


@dataclass
class Verdict:
    """How a soak went; ``wrong`` is empty if it passed."""

    faults: int = 0
    events: int = 0
    tasks: int = 0
    calls: int = 0
    growth_bytes: int = 0
    memory: str = "flat"
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str) -> None:
        """Note something that is wrong, in a sentence that begins with what kind it is."""
        if what.startswith("memory"):
            self.memory = "NOT FLAT"
        kinds = (kind for words, kind in OF_WORDS.items() if what.startswith(words))
        self._add(next(kinds, OTHER), what)

    def judge(self, facts: Facts) -> None:
        """Look at what clients saw and what the tables hold."""
        self.events, self.tasks = len(facts.events), len(facts.tasks)
        self.calls = len(facts.handlings)
        for violation in judge(facts):
            self._add(_kind(violation), f"{violation.invariant}: {violation.what}")

    def line(self, *, seed: int, minutes: float) -> str:
        """Return all of it in one line."""
        figures = f"faults={self.faults} events={self.events} tasks={self.tasks} calls={self.calls}"
        kinds = " ".join(f"{kind}={self.counts[kind]}" for kind in KINDS)
        memory = f"memory={self.growth_bytes / 2**20:+.1f}MiB ({self.memory})"
        verdict = "FAILED" if self.wrong else "passed"
        return f"{verdict} SEED={seed} MINUTES={minutes:g} {figures} {kinds} {memory}"

    def _add(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.wrong.append(what)


def _kind(violation: Violation) -> str:
    words = (kind for words, kind in OF_WORDS.items() if violation.what.startswith(words))
    return next(words, OF_INVARIANT.get(violation.invariant, OTHER))
