"""The life of a task: its states and every move between them.

The values are KanthorQ's, so rows can be compared with a Go installation's.
"""

from dataclasses import dataclass
from enum import IntEnum


class TaskState(IntEnum):
    """Where a task stands; the comment says what may happen next."""

    PENDING = 0  # parked: release, cancel
    AVAILABLE = 1  # due at schedule_at: claim, cancel
    RUNNING = 2  # leased until schedule_at: ack, nack, renew; afterwards claim
    CANCELLING = 3  # its cancellation handler is due or runs: claim, ack, nack
    COMPLETED = 101  # acknowledged: reset
    RETRYABLE = 102  # failed, waits for its back-off: claim, cancel
    CANCELLED = -101  # final by request: resume, reset
    DISCARDED = -102  # final by exhaustion: resume, reset

    @property
    def label(self) -> str:
        return self.name.capitalize()


S = TaskState

FINAL = frozenset({S.COMPLETED, S.CANCELLED, S.DISCARDED})
CLAIMABLE = frozenset({S.AVAILABLE, S.RETRYABLE, S.RUNNING, S.CANCELLING})
LEASED = frozenset({S.RUNNING, S.CANCELLING})


@dataclass(frozen=True, slots=True)
class Move:
    """``verb`` leads from any of ``sources`` to one of ``targets``; elsewhere it is a no-op."""

    verb: str
    sources: frozenset[TaskState]
    targets: tuple[TaskState, ...]


def _move(verb: str, *sources: TaskState, to: tuple[TaskState, ...]) -> Move:
    return Move(verb, frozenset(sources), to)


CLAIM = _move("claim", S.AVAILABLE, S.RETRYABLE, to=(S.RUNNING,))
RECLAIM = _move("claim", S.RUNNING, to=(S.RUNNING, S.DISCARDED, S.CANCELLED, S.CANCELLING))
CLAIM_CANCELLING = _move("claim", S.CANCELLING, to=(S.CANCELLING, S.CANCELLED, S.DISCARDED))
ACK = _move("ack", S.RUNNING, to=(S.COMPLETED,))
NACK = _move("nack", S.RUNNING, to=(S.RETRYABLE, S.DISCARDED, S.CANCELLED, S.CANCELLING))
ACK_CANCELLING = _move("ack", S.CANCELLING, to=(S.CANCELLED,))
NACK_CANCELLING = _move("nack", S.CANCELLING, to=(S.CANCELLING, S.DISCARDED))
HAND_BACK = _move("hand_back", S.RUNNING, to=(S.AVAILABLE, S.CANCELLED, S.CANCELLING))
HAND_BACK_CANCELLING = _move("hand_back", S.CANCELLING, to=(S.CANCELLING,))
CANCEL = _move("cancel", S.PENDING, S.AVAILABLE, S.RETRYABLE, to=(S.CANCELLED, S.CANCELLING))
RESUME = _move("resume", S.DISCARDED, S.CANCELLED, to=(S.AVAILABLE,))
RELEASE = _move("release", S.PENDING, to=(S.AVAILABLE,))
RESET = _move("reset", S.COMPLETED, S.DISCARDED, S.CANCELLED, to=(S.AVAILABLE,))

MOVES = (
    CLAIM,
    RECLAIM,
    CLAIM_CANCELLING,
    ACK,
    NACK,
    ACK_CANCELLING,
    NACK_CANCELLING,
    HAND_BACK,
    HAND_BACK_CANCELLING,
    CANCEL,
    RESUME,
    RELEASE,
    RESET,
)


def targets(verb: str, state: TaskState) -> tuple[TaskState, ...]:
    """Return where ``verb`` may lead from ``state``; empty when it is a no-op there."""
    for move in MOVES:
        if move.verb == verb and state in move.sources:
            return move.targets
    return ()


def sources(verb: str) -> frozenset[TaskState]:
    """Return the states from which ``verb`` leads anywhere."""
    return frozenset().union(*(move.sources for move in MOVES if move.verb == verb))
