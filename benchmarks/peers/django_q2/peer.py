"""django-q2 on its ORM broker, one worker process."""

from benchmarks.peers.peer import Peer

PEER = Peer(
    name="django-q2",
    package="django_q2",
    worker=("manage.py", "qcluster"),
    settled="SELECT NOT EXISTS (SELECT FROM django_q_ormq)",
    jobs_per_second=400,
    inserts_per_second=300,
    settings="benchmarks.peers.django_q2.settings",
)
