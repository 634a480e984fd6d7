"""procrastinate, ten handlers at a time."""

from benchmarks.peers.peer import BULK_WORKS, Peer

PEER = Peer(
    name="procrastinate",
    package="procrastinate",
    worker=(
        "-m",
        "procrastinate",
        "--app=benchmarks.peers.procrastinate.tasks.app",
        "worker",
        "--concurrency=10",
    ),
    settled="SELECT NOT EXISTS (SELECT FROM procrastinate_jobs WHERE status <> 'succeeded')",
    jobs_per_second=500,
    inserts_per_second=350,
    works=BULK_WORKS,
)
