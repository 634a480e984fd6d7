"""huey on Redis: the same code in the same environment."""

from dataclasses import replace

from benchmarks.peers.huey import peer

PEER = replace(peer.PEER, name="huey+redis", broker="redis", jobs_per_second=4_500)
