"""A release that is replaced, file by file, under a worker that runs it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from django.conf import settings

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Event, Task
from tests.concurrency import wait_until
from tests.processes import PATIENCE, runworker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with the package alone, as ``pip`` would have installed it."""
    source = Path(settings.BASE_DIR) / "kanthorq_django"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "release/kanthorq_django", ignore=ignored)
    return tmp_path / "release"


def test_a_worker_whose_files_are_gone_settles_and_gives_back_what_it_leased(
    release: Path, tmp_path: Path
):
    gate = tmp_path / "gate"
    gates = [""] * 30 + [str(gate)] + [""] * 5
    code = {"PYTHONPATH": f"{release}{os.pathsep}{settings.BASE_DIR}", "PYTHONSAFEPATH": "1"}
    with runworker("flaky", "gated", "--concurrency", 1, **code) as worker:
        worker.wait_until_started()
        shutil.rmtree(release)

        publish("flaky.first", stream="ledger")
        wait_until(lambda: Task.objects.completed().exists(), PATIENCE)
        task = Task.objects.get()
        errors = [error["error"] for error in task.attempted_errors]
        assert errors == ["ValueError: attempt 1 fails", "ValueError: attempt 2 fails"]

        publish_many(
            [Event(subject="gated.some", body={"gate": name}) for name in gates], stream="ledger"
        )
        wait_until(lambda: Task.objects.completed().count() == 31, PATIENCE)
        wait_until(lambda: Task.objects.running().count() == 6, PATIENCE)
        worker.send(signal.SIGTERM)
        wait_until(lambda: Task.objects.available().count() == 5, PATIENCE)
        gate.touch()

        assert worker.wait() == 0
    assert "No such file" not in worker.text
