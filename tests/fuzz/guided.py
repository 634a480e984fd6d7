"""``make fuzz CASES=100000``: coverage-guided fuzzing of everything that parses, by atheris.

    python -m tests.fuzz.guided --cases 100000 [--seed 7] [TARGET ...]
    python -m tests.fuzz.guided --replay rules 0012ab…

The cases are dealt out evenly to the targets, each in a process of its own. A finding is an
exception that is no refusal, or a case that takes longer than ``SECONDS_MAX``; its bytes are
printed, and the exit status is 1. Replaying one needs no atheris.
"""

import argparse
import faulthandler
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import django

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

SECONDS_MAX = 30  # of one case, on a machine with other work to do
INPUT_SIZE_MAX = 512  # bytes
INSTRUMENTED = (
    "kanthorq_django.admin.content",
    "kanthorq_django.admin.schedule_fields",
    "kanthorq_django.conf",
    "kanthorq_django.declarations",
    "kanthorq_django.domain",
    "kanthorq_django.management",
    "kanthorq_django.models.publishing.body",
    "kanthorq_django.models.scheduling.definition",
    "kanthorq_django.models.publishing.envelope",
    "kanthorq_django.subscribers",
    "tests.fuzz.reader",
    "tests.fuzz.targets",
)


class Ran(NamedTuple):
    """How a target went: its number of cases, and the bytes of its finding, if there was one."""

    cases: int
    finding: bytes | None


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    if given.replay:
        name, digits = given.replay
        faulthandler.dump_traceback_later(SECONDS_MAX, exit=True)
        try:
            _target(name)(bytes.fromhex(digits))
        finally:
            faulthandler.cancel_dump_traceback_later()  # it would end this process later on
        return 0
    if given.child:
        _fuzz(given.child, given.libfuzzer)
    return _run_all(given.targets or list(_targets()), given.cases, given.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--cases", type=int, default=100_000, help="in all; default: 100,000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "HEX"), help="run one case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--libfuzzer", action="append", default=[], help=argparse.SUPPRESS)
    return parser


def _run_all(names: Sequence[str], cases: int, seed: int) -> int:
    share = -(-cases // len(names))
    total, findings = 0, 0
    for name in names:
        ran = _run(name, share, seed)
        total += ran.cases
        findings += ran.finding is not None
        print(f"{name:<16} {ran.cases:>9,} cases", flush=True)  # noqa: T201  # a command
        if ran.finding is not None:
            print(_replayed(name, ran.finding))  # noqa: T201
            print(f"FOUND: python -m tests.fuzz.guided --replay {name} {ran.finding.hex()}")  # noqa: T201
    print(f"{total:,} cases, {len(names)} targets, {findings} findings (seed {seed})")  # noqa: T201
    return 1 if findings else 0


def _run(name: str, cases: int, seed: int) -> Ran:
    """Fuzz one target in a process: libFuzzer ends its process with its last case."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "runs": cases,
            "seed": seed,
            "timeout": SECONDS_MAX,
            "max_len": INPUT_SIZE_MAX,
            "len_control": 0,
            "artifact_prefix": f"{folder}/",
        }
        command = [sys.executable, "-u", "-m", "tests.fuzz.guided", "--child", name]
        command += [f"--libfuzzer=-{option}={value}" for option, value in options.items()]
        ended = subprocess.run(command, capture_output=True, check=False)
        output = (ended.stdout + ended.stderr).decode(errors="replace")
        artifacts = sorted(Path(folder).iterdir())
        finding = artifacts[0].read_bytes() if artifacts else None
    if finding is None and ended.returncode:
        raise RuntimeError(f"{name} could not be fuzzed:\n{output}")
    return Ran(_cases(output), finding)


def _cases(output: str) -> int:
    counts = re.findall(r"^#(\d+)|^Done (\d+) runs", output, re.MULTILINE)
    return max((int(number) for pair in counts for number in pair if number), default=0)


def _replayed(name: str, finding: bytes) -> str:
    """Return what happens when the case is run again, without atheris."""
    command = [sys.executable, "-m", "tests.fuzz.guided", "--replay", name, finding.hex()]
    ended = subprocess.run(command, capture_output=True, check=False)
    return ended.stderr.decode(errors="replace")[-4_000:].strip()


def _fuzz(name: str, options: Sequence[str]) -> None:
    """Never returns."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        case = _target(name)
    atheris.Setup([sys.argv[0], *options], case)
    atheris.Fuzz()


def _target(name: str) -> Callable[[bytes], None]:
    from tests.fuzz.reader import Reader

    target = _targets()[name]
    return lambda data: target(Reader(data))


def _targets() -> "Mapping[str, Target]":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    from tests.fuzz.targets import TARGETS

    return TARGETS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
