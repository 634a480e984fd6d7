"""How handlers run beside each other: in threads, and on one event loop."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import markcoroutinefunction, sync_to_async
from django.db import DatabaseError, InterfaceError, connection, transaction

from kanthorq_django import Discard, Fixed, Never, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker.lanes import lane, orm_thread
from tests.concurrency import wait_until
from tests.errors import Abort
from tests.ledger.models import Entry
from tests.worker.working import PATIENCE, announce, has_state, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)


class Overlap:
    """Counts how many are inside at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.inside = self.most = self.total = 0

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.total += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1


def test_handlers_run_in_threads_at_the_same_time():
    meeting = threading.Barrier(4, timeout=PATIENCE)

    @subscribe("work.>", stream="work", consumer="meets")
    def meet(message: Message) -> None:
        meeting.wait()  # passes only when four are here

    announce(4)

    assert work_off("meets", concurrency=4) == 4
    assert Task.objects.completed().count() == 4


def test_a_slow_handler_does_not_hold_up_the_batch():
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="one-is-slow")
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            end.wait(PATIENCE)

    announce(30)
    with working("one-is-slow", concurrency=2, batch_size=30):
        wait_for_state(TaskState.COMPLETED, 29)
        assert Task.objects.running().count() == 1
        end.set()
        wait_for_state(TaskState.COMPLETED, 30)


def test_no_more_handlers_run_at_a_time_than_asked_for():
    overlap = Overlap()

    @subscribe("work.>", stream="work", consumer="counted")
    def count(message: Message) -> None:
        with overlap:
            threading.Event().wait(0.01)  # in which others could begin

    announce(40)

    assert work_off("counted", concurrency=3) == 40
    assert overlap.most == 3


def test_coroutines_overlap_on_one_loop():
    overlap, threads, all_are_here = Overlap(), set(), asyncio.Event()

    @subscribe("work.>", stream="work", consumer="meets")
    async def meet(message: Message) -> None:
        threads.add(threading.get_ident())
        with overlap:
            if overlap.inside == 20:
                all_are_here.set()
            await asyncio.wait_for(all_are_here.wait(), PATIENCE)

    announce(20)

    assert work_off("meets", concurrency=20) == 20
    assert Task.objects.completed().count() == 20
    assert len(threads) == 1


def test_no_more_coroutines_run_at_a_time_than_asked_for():
    overlap = Overlap()

    @subscribe("work.>", stream="work", consumer="counted")
    async def count(message: Message) -> None:
        with overlap:
            await asyncio.sleep(0.01)  # in which others could begin

    announce(40)

    assert work_off("counted", concurrency=3) == 40
    assert overlap.most == 3


def test_a_coroutine_that_uses_the_orm_does_not_hold_up_one_that_does_not():
    is_held, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="uses-orm")
    async def look_up(message: Message) -> int:
        def block() -> int:
            is_held.set()
            end.wait(PATIENCE)
            return Task.objects.count()

        return await sync_to_async(block)()

    @subscribe("other.>", stream="work", consumer="is-quick")
    async def be_quick(message: Message) -> None:
        is_held.wait(PATIENCE)

    announce(1)
    with working("uses-orm", "is-quick", concurrency=4):
        assert is_held.wait(PATIENCE)
        announce(3, "other.due")
        wait_for_state(TaskState.COMPLETED, 3, consumer__name="is-quick")
        end.set()
        wait_for_state(TaskState.COMPLETED, 1, consumer__name="uses-orm")


def test_an_interpreter_that_exits_is_no_error_of_a_coroutine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As under a code reloader: threads take nothing more, and coroutines go on for a moment."""

    def refused(_: object) -> Callable[[], Coroutine[Any, Any, None]]:
        async def refuse() -> None:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        return refuse

    @subscribe("work.>", stream="work", consumer="async")
    async def handle(message: Message) -> None:
        pass

    monkeypatch.setattr(orm_thread, "sync_to_async", refused)
    announce()
    assert work_off("async") == 1
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_plain_and_async_handlers_share_a_worker():
    @subscribe("work.>", stream="work", consumer="plain")
    def plain(message: Message) -> str:
        return threading.current_thread().name

    @subscribe("work.>", stream="work", consumer="async")
    async def coroutine(message: Message) -> str:
        return threading.current_thread().name

    announce(1)

    assert work_off("plain", "async", concurrency=1) == 2
    results = dict(Task.objects.values_list("consumer__name", "result"))
    assert results == {"plain": "kanthorq-handler-0", "async": "kanthorq-loop"}


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("no")])
def test_whatever_a_coroutine_raises_the_loop_goes_on(error: BaseException):
    @subscribe("work.>", stream="work", consumer="raises")
    async def handle(message: Message) -> None:
        if message.event.json() == 0:
            raise error

    announce(3)

    assert work_off("raises", concurrency=1) == 3
    assert Counter(Task.objects.values_list("state", flat=True)) == {
        TaskState.RETRYABLE: 1,
        TaskState.COMPLETED: 2,
    }


class Untellable:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        raise self._error


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(3), Abort()])
def test_an_outcome_that_cannot_be_told_does_not_cost_the_thread(error: BaseException):
    reason: Any = Untellable(error)

    @subscribe("work.>", stream="work", consumer="untold")
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            raise Discard(reason)

    announce(5)

    assert work_off("untold", concurrency=1) == 5
    assert Task.objects.completed().count() == 4
    (task,) = Task.objects.retryable()
    assert type(error).__name__ in task.attempted_errors[0]["error"]


def test_a_filter_of_the_log_that_raises_costs_no_verdict(capsys: pytest.CaptureFixture[str]):
    class Raises(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise LookupError("from a filter")

    @subscribe("work.>", stream="work", consumer="filtered", retry=Fixed())
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            raise ValueError("no")
        if message.event.json() == 1:  # so that the acknowledger has to log as well
            Task.objects.filter(event=message.event).update(lease_epoch=7)

    log, raises = logging.getLogger("kanthorq_django.worker"), Raises()
    announce(5)
    log.addFilter(raises)
    try:
        with working("filtered", concurrency=1):
            wait_for_state(TaskState.COMPLETED, 3)
            announce(2, "work.again")
            wait_for_state(TaskState.RETRYABLE, 2)
    finally:
        log.removeFilter(raises)
    errors = Task.objects.retryable().values_list("attempted_errors__0__error", flat=True)
    assert set(errors) == {"ValueError: no"}
    assert "LookupError: from a filter" in capsys.readouterr().err


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, Abort])
def test_a_retry_policy_that_exits_costs_no_thread(error: type[BaseException], is_async: bool):
    class Exits(Fixed):
        def next_delay(self, attempt: int, *, chance: float | None = None) -> timedelta:
            raise error

    def handle(message: Message) -> None:
        if message.event.json() < 2:
            raise ValueError

    async def handle_async(message: Message) -> None:
        handle(message)

    declare = subscribe("work.>", stream="work", consumer="exits", retry=Exits())
    declare(handle_async if is_async else handle)
    announce(6)
    with working("exits", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 4)
        wait_for_state(TaskState.RETRYABLE, 2)


class Mute(Exception):
    def __str__(self) -> str:
        raise Abort


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_whose_text_raises_costs_no_thread(is_async: bool):
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            raise Mute

    async def handle_async(message: Message) -> None:
        handle(message)

    subscribe("work.>", stream="work", consumer="mute")(handle_async if is_async else handle)
    announce(3)
    with working("mute", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 2)
        wait_for_state(TaskState.RETRYABLE)


@pytest.mark.parametrize("error", [ValueError, SystemExit, Abort])
def test_an_exception_that_somebody_sets_on_an_idle_thread_costs_none(error: type[BaseException]):
    """As a watchdog does that looks at the clock after the handler has returned."""
    threads: list[int] = []

    @subscribe("work.>", stream="work", consumer="watched")
    def handle(message: Message) -> None:
        threads.append(threading.get_ident())

    with working("watched", concurrency=1):
        for count in range(1, 5):
            announce()
            wait_for_state(TaskState.COMPLETED, count)
            set_exception(threads[0], error)
    assert len(set(threads)) == 1


def set_exception(thread: int, error: type[BaseException]) -> None:
    """Have a thread raise ``error`` as soon as it runs."""
    found = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error)
    )
    assert found == 1


async def exit_in_a_task() -> None:
    async def leave() -> None:
        sys.exit(3)

    await asyncio.gather(leave(), asyncio.sleep(0))


async def cancel_everything() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(PATIENCE)


@pytest.mark.parametrize("harm", [exit_in_a_task, cancel_everything])
def test_whatever_a_coroutine_does_to_the_loop_it_goes_on(
    harm: Callable[[], Coroutine[Any, Any, None]],
):
    @subscribe("work.>", stream="work", consumer="harms", retry=Fixed(timedelta(0)))
    async def handle(message: Message) -> None:
        await asyncio.sleep(0.001)
        if message.event.json() % 10 == 3 and message.attempt == 1:
            await harm()

    announce(40)
    with working("harms", concurrency=4):
        wait_for_state(TaskState.COMPLETED, 40)


def test_what_cancelled_a_coroutine_of_its_own_accord_stands_in_its_history():
    @subscribe("work.>", stream="work", consumer="own")
    async def handle(message: Message) -> None:
        raise asyncio.CancelledError("what it waited for was cancelled")

    announce(1)
    work_off("own")
    error = Task.objects.retryable().get().attempted_errors[0]["error"]
    assert error == "CancelledError: what it waited for was cancelled"


def test_a_blocked_event_loop_keeps_nothing_that_others_could_run():
    blocked, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="blocks")
    async def handle(message: Message) -> None:
        blocked.set()
        end.wait(2 * PATIENCE)

    announce(5)
    with working("blocks", concurrency=5, shutdown_timeout=timedelta(0)) as loop:
        assert blocked.wait(PATIENCE)
        loop.stop()
        wait_for_state(TaskState.AVAILABLE, 4, attempt_count=0)
        end.set()


def test_a_loop_that_stays_blocked_gives_back_what_it_has_not_begun(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(lane, "WAIT_LONGEST", 0.1)
    end, begun = threading.Event(), list[int]()

    @subscribe("work.>", stream="work", consumer="blocks")
    async def handle(message: Message) -> None:
        begun.append(message.attempt)
        end.wait(2 * PATIENCE)

    announce(5)
    with working("blocks", concurrency=5):
        wait_for_state(TaskState.AVAILABLE, 4, attempt_count=0)
        end.set()
        wait_for_state(TaskState.COMPLETED, 5)
    assert begun == [1] * 5, "what was given back ran all the same"


def leave_a_block_open() -> None:
    transaction.atomic().__enter__()


def leave_a_lost_block_open() -> None:
    transaction.atomic().__enter__()
    connection.connection.close()


def leave_autocommit_off() -> None:
    transaction.set_autocommit(False)


def leave_a_broken_transaction() -> None:
    transaction.set_autocommit(False)
    with contextlib.suppress(DatabaseError):
        connection.cursor().execute("SELECT 1/0")


def begin_past_django() -> None:
    connection.cursor().execute("BEGIN")


def close_the_connection() -> None:
    connection.close()


def close_the_connection_behind_django() -> None:
    connection.connection.close()
    with contextlib.suppress(DatabaseError, InterfaceError):
        Task.objects.exists()


@pytest.mark.parametrize(
    "harm",
    [
        leave_a_block_open,
        leave_a_lost_block_open,
        leave_autocommit_off,
        leave_a_broken_transaction,
        begin_past_django,
        close_the_connection,
        close_the_connection_behind_django,
    ],
)
def test_what_a_handler_leaves_behind_does_not_harm_the_next(harm: Callable[[], None]):
    @subscribe("work.>", stream="work", consumer="harms")
    def handle(message: Message) -> int:
        assert not connection.in_atomic_block
        with transaction.atomic():
            count = Task.objects.count()
        Entry.objects.create(event_id=message.event.pk)
        if message.event.json() == 0:
            harm()
        return count

    announce(2)

    assert work_off("harms", concurrency=1) == 2
    assert list(Task.objects.values_list("state", flat=True)) == [TaskState.COMPLETED] * 2
    assert Entry.objects.count() == 2


def test_objects_and_marked_functions_are_awaited_as_coroutines_are():
    handled: list[str] = []

    class Handler:
        async def __call__(self, message: Message) -> None:
            await asyncio.sleep(0)
            handled.append(message.event.subject)

    def hand_on(message: Message) -> object:
        return Handler()(message)

    subscribe("work.object", stream="work", consumer="object")(Handler())
    subscribe("work.marked", stream="work", consumer="marked")(markcoroutinefunction(hand_on))

    @subscribe("work.plain", stream="work", consumer="plain", parked=True)
    def plain(message: Message) -> None: ...

    plain.on_cancel()(Handler())
    for subject in ("work.object", "work.marked", "work.plain"):
        announce(subject=subject)
    work_off("object", "marked", "plain")
    Task.objects.pending().cancel()
    work_off("plain")
    assert sorted(handled) == ["work.marked", "work.object", "work.plain"]


@pytest.mark.parametrize("is_async", [False, True])
def test_who_stops_as_its_worker_ends_is_handed_back_uncounted(is_async: bool):
    begun = threading.Event()

    @subscribe("work.plain", stream="work", consumer="plain", retry=Never())
    def handle(message: Message) -> None:
        begun.set()
        while True:
            message.raise_if_cancelled()
            threading.Event().wait(0.01)

    @subscribe("work.async", stream="work", consumer="async", retry=Never())
    async def handle_async(message: Message) -> None:
        begun.set()
        await asyncio.sleep(2 * PATIENCE)

    kind = "async" if is_async else "plain"
    announce(subject=f"work.{kind}")
    with working(kind, shutdown_timeout=timedelta(0)):
        assert begun.wait(PATIENCE)
    task = Task.objects.get()
    assert (task.state, task.attempt_count) == (TaskState.AVAILABLE, 0)
    assert task.attempted_errors == []


def test_a_worker_that_is_to_end_says_which_handlers_it_waits_for(
    caplog: pytest.LogCaptureFixture,
):
    begun, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="waits")
    def handle(message: Message) -> None:
        begun.set()
        assert end.wait(PATIENCE)

    runs, _ = announce(2)
    with caplog.at_level(logging.INFO, "kanthorq_django.worker"):
        with working("waits", concurrency=1) as loop:
            assert begun.wait(PATIENCE)
            loop.stop()
            wait_until(lambda: "is to end" in caplog.text, PATIENCE)
            end.set()
        work_off("waits")

    assert has_state(TaskState.COMPLETED, 2)
    (told,) = [each.message for each in caplog.records if "is to end" in each.message]
    assert told.endswith(f"waits up to 20 s for waits {runs.pk}")
