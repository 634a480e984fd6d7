"""django-q2's publishers; it has no way to publish many at once but one transaction."""

from collections.abc import Iterable

from benchmarks.peers import django_app

django_app.set_up()

from django.db import transaction  # noqa: E402  # after the apps are loaded
from django_q.tasks import async_task  # noqa: E402

from benchmarks.peers.adapter import Adapter, main  # noqa: E402


class DjangoQ2Adapter(Adapter):
    def install(self) -> None:
        django_app.create_tables()

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        with transaction.atomic():
            self.publish(job, numbers)

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            async_task(f"benchmarks.peers.django_handlers.{job}", number)


if __name__ == "__main__":
    main(DjangoQ2Adapter())
