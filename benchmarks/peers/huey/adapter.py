"""huey's publishers; it has no way to publish many at once."""

from collections.abc import Iterable

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, main
from benchmarks.peers.huey.tasks import TASKS


class HueyAdapter(Adapter):
    def install(self) -> None:
        django_app.create_tables()

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        self.publish(job, numbers)

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            TASKS[job](number)


if __name__ == "__main__":
    main(HueyAdapter())
