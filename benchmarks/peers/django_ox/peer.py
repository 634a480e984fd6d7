"""django-ox, ten tasks at a time."""

from benchmarks.peers.peer import BULK_WORKS, Peer

PEER = Peer(
    name="django-ox",
    package="django_ox",
    worker=("manage.py", "ox_worker", "--concurrency", "10"),
    settled="SELECT NOT EXISTS (SELECT FROM django_ox_oxtask WHERE status <> 'SUCCESSFUL')",
    jobs_per_second=500,
    inserts_per_second=350,
    python=(3, 12),
    settings="benchmarks.peers.django_ox.settings",
    works=BULK_WORKS,
)
