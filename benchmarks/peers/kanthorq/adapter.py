"""KanthorQ's publishers."""

import os
from collections.abc import Iterable

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, body, main

django_app.set_up()

from benchmarks.peers.kanthorq import explaining, filling, measuring  # noqa: E402  # after the apps are loaded
from kanthorq_django import publish, publish_many  # noqa: E402
from kanthorq_django.models import Event  # noqa: E402


class KanthorqAdapter(Adapter):
    def install(self) -> None:
        django_app.create_tables()

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        keys = int(os.environ.get("BENCH_KEYS", "0"))
        events = [
            Event(
                subject=job,
                body=body(number),
                resource_key=f"key-{number % keys}" if keys else "",
            )
            for number in numbers
        ]
        publish_many(events, stream=job)

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            publish(job, body(number), stream=job)

    def events(self, count: str) -> dict[str, float]:
        """Fill a stream."""
        filling.add_events("rare", int(count))
        return {}

    def finished(self, count: str, queued: str) -> dict[str, float]:
        """Let the consumer of no-ops have a past, and then something to do."""
        if int(count):
            filling.add_finished_tasks("noop", int(count))
        self.enqueue("noop", range(int(queued)))
        return {}

    def pull(self, _count: str) -> dict[str, float]:
        """Measure pulls at the end of a stream that is filled already."""
        return {"time": measuring.pull_milliseconds("rare")}

    def explain(self) -> dict[str, str]:
        """Return the plans of the hot statements."""
        return explaining.plans("noop")

    def cancel(self, job: str, count: str) -> dict[str, float]:
        """Cancel running jobs."""
        measuring.cancel_running(job, range(int(count)))
        return {}


if __name__ == "__main__":
    main(KanthorqAdapter())
