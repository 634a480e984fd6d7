"""chancy's publishers, of its interface for synchronous code."""

import asyncio
from collections.abc import Iterable

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, main
from benchmarks.peers.chancy.jobs import JOBS, QUEUES, app

BATCH = 1_000


class ChancyAdapter(Adapter):
    def install(self) -> None:
        django_app.create_tables()
        asyncio.run(self._migrate())

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        jobs = [JOBS[job].job.with_kwargs(number=number) for number in numbers]
        for _references in app.sync_push_many(jobs, batch_size=BATCH):
            pass  # it is a generator: without being asked it publishes nothing

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            app.sync_push(JOBS[job].job.with_kwargs(number=number))

    async def _migrate(self) -> None:
        async with app:
            await app.migrate()
            for queue in QUEUES:
                await app.declare(queue, upsert=True)


if __name__ == "__main__":
    main(ChancyAdapter())
