"""django-tasks-db, whose worker runs one task at a time."""

from benchmarks.peers.peer import Peer

PEER = Peer(
    name="django-tasks-db",
    package="django_tasks_db",
    worker=("manage.py", "db_worker", "--no-startup-delay"),
    settled=(
        "SELECT NOT EXISTS"
        " (SELECT FROM django_tasks_database_dbtaskresult WHERE status <> 'SUCCESSFUL')"
    ),
    jobs_per_second=400,
    inserts_per_second=300,
    python=(3, 12),
    settings="benchmarks.peers.django_tasks_db.settings",
)
