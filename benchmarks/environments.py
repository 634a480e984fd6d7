"""The virtual environment of each contestant, made once and again when its pins change."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.exceptions import PeerUnavailable
from benchmarks.peers.peer import Peer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / ".peers"
NEWEST_MINOR = 14


def python_of(peer: Peer) -> Path:
    """Return the interpreter of a contestant's environment, which is made if need be.

    Raises PeerUnavailable if it cannot be.
    """
    pins = ROOT / "benchmarks" / "peers" / peer.package / "requirements.txt"
    if not pins.exists():
        return Path(sys.executable)  # it is this project
    venv = FOLDER / peer.package
    stamp, wanted = venv / ".ready", hashlib.sha256(pins.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(venv, ignore_errors=True)
        _make(venv, pins, _interpreter(peer))
        stamp.write_text(wanted)
    return venv / "bin" / "python"


def _make(venv: Path, pins: Path, interpreter: str) -> None:
    print(f"{venv.name}: making {venv.relative_to(ROOT)}", file=sys.stderr)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    commands: list[list[str | Path]] = [
        [interpreter, "-m", "venv", venv],
        [*pip, "--quiet", "--requirement", pins],
    ]
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise PeerUnavailable(f"its packages cannot be installed: {_last_line(done.stderr)}")


def _interpreter(peer: Peer) -> str:
    if sys.version_info[:2] >= peer.python:
        return sys.executable
    for found in _newer_interpreters(peer.python[1]):
        # A shim is there for versions that are not, and some builds lack ssl.
        probe = subprocess.run([found, "-c", "import ssl"], check=False, capture_output=True)
        if probe.returncode == 0:
            return found
    raise PeerUnavailable(f"it needs Python {'.'.join(map(str, peer.python))}, which is not here")


def _newer_interpreters(minor: int) -> Iterator[str]:
    for number in range(minor, NEWEST_MINOR + 1):
        if found := shutil.which(f"python3.{number}"):
            yield found
        pattern = f".pyenv/versions/3.{number}.*/bin/python3"
        yield from map(str, sorted(Path.home().glob(pattern)))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["pip said nothing"])[-1]
