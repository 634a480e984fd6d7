import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import RFC_4122, UUID

import pytest

from kanthorq_django.domain import identifiers
from kanthorq_django.domain.identifiers import uuid7


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A wall clock that shows what the test sets, in milliseconds."""
    shown = [1_700_000_000_000]
    monkeypatch.setattr(identifiers, "_clock", identifiers._Clock())
    monkeypatch.setattr(time, "time_ns", lambda: shown[0] * 1_000_000)
    return shown


def milliseconds(identifier: UUID) -> int:
    return identifier.int >> 80


def test_an_id_is_a_version_7_uuid_of_rfc_9562() -> None:
    made = [uuid7() for _ in range(1_000)]
    assert {(identifier.version, identifier.variant) for identifier in made} == {(7, RFC_4122)}


def test_an_id_begins_with_the_time() -> None:
    before = time.time_ns() // 1_000_000
    made = milliseconds(uuid7())
    # Ids made faster than the clock ticks may run ahead of it.
    assert before <= made <= time.time_ns() // 1_000_000 + 1


def test_ids_of_one_process_only_grow() -> None:
    made = [uuid7() for _ in range(20_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_ids_of_one_millisecond_grow(clock: list[int]) -> None:
    made = [uuid7() for _ in range(1_000)]
    assert made == sorted(set(made))
    assert {milliseconds(identifier) for identifier in made} == set(clock)


def test_ids_grow_while_the_clock_steps_back(clock: list[int]) -> None:
    made = [uuid7()]
    for step in (0, -1, -3_600_000, 5, 3_600_000, 1):
        clock[0] += step
        made += [uuid7(), uuid7()]
    assert made == sorted(set(made))


def test_a_full_counter_borrows_from_the_next_millisecond(clock: list[int]) -> None:
    first = uuid7()
    identifiers._clock._last = identifiers._clock._highest
    second, third = uuid7(), uuid7()
    assert first < second < third
    assert {milliseconds(second), milliseconds(third)} == {milliseconds(first) + 1}
    assert (second.version, second.variant) == (7, RFC_4122)


def test_a_counter_counts_to_its_end_and_not_beyond(clock: list[int]) -> None:
    first = uuid7()
    identifiers._clock._last = identifiers._clock._highest - identifiers._STEP
    last, following = uuid7(), uuid7()
    assert first < last < following
    assert milliseconds(last) == milliseconds(first)
    assert milliseconds(following) == milliseconds(first) + 1


def test_a_counter_begins_in_the_lower_half_of_its_room(clock: list[int]) -> None:
    for _ in range(1_000):
        clock[0] += 1
        assert uuid7().int >> 61 & 1 == 0


def test_ids_of_the_same_moment_in_two_processes_differ_in_73_bits(clock: list[int]) -> None:
    mine = uuid7().int
    identifiers._clock = identifiers._Clock()
    made = [mine]
    for _ in range(200):
        identifiers._clock = identifiers._Clock()
        made.append(uuid7().int)
    random = [bit for bit in range(76) if len({one >> bit & 1 for one in made}) == 2]
    assert random == [*range(61), *range(64, 76)]


def test_ids_of_many_threads_are_different_and_grow_in_each() -> None:
    barrier = threading.Barrier(8)

    def make() -> list[UUID]:
        barrier.wait(timeout=10)
        return [uuid7() for _ in range(2_000)]

    with ThreadPoolExecutor(8) as threads:
        batches = [future.result() for future in [threads.submit(make) for _ in range(8)]]
    assert all(batch == sorted(batch) for batch in batches)
    assert len({identifier for batch in batches for identifier in batch}) == 16_000


FORK = """
import os, threading
from kanthorq_django.domain import identifiers
identifiers.uuid7()
reader, writer = os.pipe()
with identifiers._clock._lock:  # as a thread of the parent may hold it at that moment
    child = os.fork()
if child == 0:
    os.write(writer, b"".join(identifiers.uuid7().bytes for _ in range(100)))
    os._exit(0)
mine = {identifiers.uuid7().bytes for _ in range(100)}
os.waitpid(child, 0)
theirs = os.read(reader, 1_600)
assert len(theirs) == 1_600, len(theirs)
assert mine.isdisjoint(theirs[start : start + 16] for start in range(0, 1_600, 16))
"""


def test_a_forked_child_makes_ids_of_its_own_and_never_hangs() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=30)
