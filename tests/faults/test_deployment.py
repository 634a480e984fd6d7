"""Deployments that go wrong half-way, and two releases of the code side by side."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from django.conf import settings

from tests.concurrency import wait_until
from tests.faults import history
from tests.faults.ground import Ground, View
from tests.faults.stage import Stage, record

FEW_ROWS = 30_000
MANY_ROWS = int(os.environ.get("FAULTS_MIGRATED_ROWS", "1000000"))
FILL = """
    INSERT INTO kanthorq_django_stream (name) VALUES ('large');
    INSERT INTO kanthorq_django_consumer (stream_id, name, subject_includes, subject_excludes,
        attempt_max, visibility_timeout, parked, has_cancel_handler, cancel_attempt_max)
    SELECT id, 'large', '[">"]', '[]', 16, '1 minute', false, false, 16
    FROM kanthorq_django_stream;
    INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata, resource_key)
    SELECT gen_random_uuid(), stream.id, 'order.made', '', '{{}}', n % 100
    FROM kanthorq_django_stream AS stream, generate_series(1, {rows}) AS n;
    INSERT INTO kanthorq_django_task (consumer_id, event_id, resource_key, state, schedule_at,
        attempt_count, lease_epoch, attempted_errors, cancel_attempt_count)
    SELECT consumer.id, event.id, event.resource_key, 1, now(), 0, 0, '[]', 0
    FROM kanthorq_django_consumer AS consumer, kanthorq_django_event AS event;
"""
SCHEMA = """
    SELECT table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable
    FROM information_schema.columns WHERE table_name LIKE 'kanthorq%'
    UNION ALL SELECT indexdef FROM pg_indexes WHERE tablename LIKE 'kanthorq%'
    UNION ALL SELECT conname || pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid::regclass::text LIKE 'kanthorq%'
    ORDER BY 1
"""


@pytest.fixture
def empty(ground: Ground) -> Iterator[View]:
    with ground.database(is_empty=True) as name:
        yield View(ground.server.socket_dir, name)


def migrate(view: View, *target: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "manage.py", "migrate", "kanthorq_django", *target, "--skip-checks"],
        cwd=settings.BASE_DIR,
        env=os.environ
        | {
            "DATABASE_URL": view.url(),
            "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
            "TESTED_DATABASE": "",
            "DEBUG": "false",
            "SECRET_KEY": "of a test",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


def kill_half_way(view: View, *, seconds: float) -> None:
    """Begin to migrate, and end that after so many seconds; it may have been quicker."""
    process = migrate(view)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_migrations_complete_after_kills(
    ground: Ground, view: View, rows: int, kills: Iterable[float]
):
    """Fill version 0001, kill what migrates it, and compare what comes out with a new schema."""
    assert migrate(view, "0001").wait() == 0
    view.execute(FILL.format(rows=rows))
    with view.session() as reader, reader.transaction():
        reader.execute("SELECT FROM kanthorq_django_task LIMIT 1")
        process = migrate(view)
        wait_until(lambda: view.value(WAITING))  # so it is half-way for certain
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    for seconds in kills:
        kill_half_way(view, seconds=seconds)

    assert migrate(view).wait() == 0

    with ground.database() as fresh:
        expected = View(ground.server.socket_dir, fresh).rows(SCHEMA)
    assert view.rows(SCHEMA) == expected
    assert view.value("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0
    assert view.value("SELECT count(*) FROM kanthorq_django_task") == rows


def test_migrations_that_are_killed_half_way_complete_when_they_are_run_again(
    ground: Ground, empty: View, seed: int
):
    chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
    # The moment is what is drawn.
    check_migrations_complete_after_kills(ground, empty, FEW_ROWS, [chance.uniform(0.3, 0.8)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_migrations_of_a_large_table_are_killed_again_and_again(
    ground: Ground, empty: View, seed: int
):
    """Each kill comes later than the one before, most of them while an index is built."""
    chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
    kills = [chance.uniform(2, 4) * (1 + nth) for nth in range(4)]
    began = time.monotonic()

    check_migrations_complete_after_kills(ground, empty, MANY_ROWS, kills)

    record(f"migrations of {MANY_ROWS} rows killed 5 times", seconds=time.monotonic() - began)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder with the package as it was when the newest migration came, and today's tests."""
    folder = tmp_path / "older"
    base = Path(settings.BASE_DIR)
    history = ["git", "log", "-1", "--format=%h", "--diff-filter=A"]
    migrations = sorted((base / "kanthorq_django/migrations").glob("0*.py"))
    found = subprocess.run(
        [*history, "--", str(migrations[-1].relative_to(base))],
        cwd=base,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode or not found.stdout.strip():
        pytest.skip("an older release is read from git, and there is no history here")
    folder.mkdir()
    archive = ["git", "archive", found.stdout.strip(), "kanthorq_django", "project", "manage.py"]
    packed = subprocess.run(archive, cwd=base, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    shutil.copytree(base / "tests", folder / "tests", ignore=shutil.ignore_patterns("*.pyc"))
    return folder


def test_an_older_release_beside_the_new_one_loses_and_doubles_nothing(stage: Stage, older: Path):
    stage.worker()
    stage.worker(code=older)
    client = stage.client()
    stage.wait_until_started()
    client.do("both 40")
    client.do("tick 5")

    stage.settle()

    facts = stage.check()
    assert len({call.who for call in facts.handlings}) == 2, "one of them did nothing"
    codes = {line["code"] for (line, *_) in history.read(stage.history) if "code" in line}
    assert len(codes) == 2, "both ran the same release"
