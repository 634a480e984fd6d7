"""What can go wrong with a contestant, without stopping the others."""


class BenchmarkError(Exception):
    """Base of the errors below. Never raised itself."""


class PeerUnavailable(BenchmarkError):
    """A contestant cannot take part here; the message says why."""


class RunFailed(BenchmarkError):
    """A run lost or doubled jobs, stood still, or its worker died."""
