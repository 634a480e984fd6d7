"""What ``pgq run`` runs: everybody's handlers, as the coroutines it demands."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from pgqueuer import AsyncpgDriver, Job, PgQueuer

from benchmarks.peers import django_app
from benchmarks.peers.adapter import dsn
from benchmarks.peers.board import board, stopwatch


@asynccontextmanager
async def create() -> AsyncIterator[PgQueuer]:
    """Yield the worker, on one connection as in pgqueuer's documentation."""
    django_app.set_up()
    connection = await asyncpg.connect(dsn())
    queue = PgQueuer(AsyncpgDriver(connection))

    @queue.entrypoint("noop")
    async def noop(job: Job) -> None:
        board().mark(int(job.payload or b""))

    @queue.entrypoint("insert")
    async def insert(job: Job) -> None:
        # Django's ORM blocks; threads side by side are faster here than acreate(), which has one.
        await asyncio.to_thread(django_app.insert_effect, int(job.payload or b""))

    @queue.entrypoint("ping")
    async def ping(job: Job) -> None:
        stopwatch().handled(int(job.payload or b""))

    yield queue
    await connection.close()
