"""procrastinate's publishers, over its connector for synchronous code."""

from collections.abc import Iterable

import procrastinate

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, dsn, main


class ProcrastinateAdapter(Adapter):
    def __init__(self) -> None:
        # An app of its own: the tasks of the worker's are bound to its asynchronous connector.
        self._app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=dsn()))
        self._app.open()

    def install(self) -> None:
        django_app.create_tables()
        self._app.schema_manager.apply_schema()

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        self._app.configure_task(job).batch_defer(*({"number": number} for number in numbers))

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        task = self._app.configure_task(job)
        for number in numbers:
            task.defer(number=number)


if __name__ == "__main__":
    main(ProcrastinateAdapter())
