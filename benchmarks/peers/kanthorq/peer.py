"""KanthorQ, run as its users run it."""

from benchmarks.peers.peer import Entry, Peer

PEER = Peer(
    name="kanthorq",
    package="kanthorq",
    worker=("manage.py", "runworker", "{job}", "--processes", "{processes}"),
    has_processes_option=True,
    settled="SELECT count(*) >= %(count)s FROM kanthorq_django_task WHERE state = 101",
    jobs_per_second=20_000,
    settings="benchmarks.peers.kanthorq.settings",
    entries={
        "insert": (
            Entry("kanthorq, atomic=True", "insert_atomic", 1_500),
            Entry("kanthorq, batch and bulk_create", "insert_batch", 15_000),
        ),
    },
)
