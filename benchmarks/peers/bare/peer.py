"""No task system at all: what PostgreSQL and Django take for the row that KanthorQ publishes."""

from benchmarks.peers.peer import Entry, Peer

PEER = Peer(
    name="bare",
    package="bare",
    jobs_per_second=4_000,
    settings="benchmarks.peers.kanthorq.settings",
    works=frozenset(),
    entries={
        "publish": (
            Entry("bare psycopg INSERT", "psycopg", 4_000),
            Entry("Django's ORM", "orm", 2_500),
        ),
    },
)
