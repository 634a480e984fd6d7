"""Its publishers are Django's own; it has no way to publish many at once but one transaction."""

from benchmarks.peers import django_app

django_app.set_up()

from benchmarks.peers.adapter import main  # noqa: E402  # after the apps are loaded
from benchmarks.peers.django_tasks import DjangoTasksAdapter  # noqa: E402

if __name__ == "__main__":
    main(DjangoTasksAdapter())
