"""The app and its jobs; the queues ask for more as soon as a job ends."""

import logging

from chancy import Chancy, Queue, job

from benchmarks.peers import django_app, django_handlers
from benchmarks.peers.adapter import dsn

django_app.set_up()
app = Chancy(dsn(), log=logging.getLogger("chancy"))

QUEUES = (
    Queue("coroutines", concurrency=500, executor=Chancy.Executor.Async, eager_polling=True),
    Queue(
        "threads",
        concurrency=django_handlers.HANDLERS_AT_A_TIME,
        executor=Chancy.Executor.Threaded,
        eager_polling=True,
    ),
)


@job(queue="coroutines")
async def warm(*, number: int) -> None:
    django_handlers.warm(number)


@job(queue="coroutines")
async def noop(*, number: int) -> None:
    django_handlers.noop(number)


@job(queue="threads")
def insert(*, number: int) -> None:
    django_handlers.insert(number)


@job(queue="coroutines")
async def ping(*, number: int) -> None:
    django_handlers.ping(number)


JOBS = {"warm": warm, "noop": noop, "insert": insert, "ping": ping}
