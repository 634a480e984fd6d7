"""dj-queue, one worker process with ten threads."""

from benchmarks.peers.peer import BULK_WORKS, Peer

PEER = Peer(
    name="dj-queue",
    package="dj_queue",
    worker=("manage.py", "dj_queue", "--only-work"),
    settled=(
        "SELECT NOT EXISTS (SELECT FROM dj_queue_ready_executions)"
        " AND NOT EXISTS (SELECT FROM dj_queue_claimed_executions)"
    ),
    jobs_per_second=500,
    inserts_per_second=350,
    python=(3, 12),
    settings="benchmarks.peers.dj_queue.settings",
    works=BULK_WORKS,
)
