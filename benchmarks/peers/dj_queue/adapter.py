"""Its publishers: Django's own for one, its own for many."""

from collections.abc import Iterable

from benchmarks.peers import django_app

django_app.set_up()

from benchmarks.peers.adapter import main  # noqa: E402  # after the apps are loaded
from benchmarks.peers.django_tasks import TASKS, DjangoTasksAdapter  # noqa: E402


class DjQueueAdapter(DjangoTasksAdapter):
    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        task = TASKS[job]
        task.get_backend().enqueue_all([(task, [number], {}) for number in numbers])


if __name__ == "__main__":
    main(DjQueueAdapter())
