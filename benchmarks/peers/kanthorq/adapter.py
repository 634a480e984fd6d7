"""KanthorQ's publishers."""

from collections.abc import Iterable

from benchmarks.peers import django_app
from benchmarks.peers.adapter import Adapter, body, main

django_app.set_up()

from kanthorq_django import publish, publish_many  # noqa: E402  # after the apps are loaded
from kanthorq_django.models import Event  # noqa: E402


class KanthorqAdapter(Adapter):
    def install(self) -> None:
        django_app.create_tables()

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        publish_many([Event(subject=job, body=body(number)) for number in numbers], stream=job)

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            publish(job, body(number), stream=job)


if __name__ == "__main__":
    main(KanthorqAdapter())
