"""pgqueuer's publishers, over asyncpg, its faster driver."""

import asyncio
from collections.abc import Iterable

import asyncpg
from pgqueuer import AsyncpgDriver, Queries

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, body, dsn, main


class PgQueuerAdapter(Adapter):
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        connection = self._loop.run_until_complete(asyncpg.connect(dsn()))
        self._queries = Queries(AsyncpgDriver(connection))

    def install(self) -> None:
        django_app.create_tables()
        self._loop.run_until_complete(self._queries.install())

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        bodies = [body(number) for number in numbers]
        count = len(bodies)
        enqueued = self._queries.enqueue([job] * count, bodies, [0] * count)
        self._loop.run_until_complete(enqueued)

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        self._loop.run_until_complete(self._publish(job, numbers))

    async def _publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            await self._queries.enqueue(job, body(number))


if __name__ == "__main__":
    main(PgQueuerAdapter())
