"""What is known after a run: what clients saw, and what the tables hold. Plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COMPLETED, CANCELLED, DISCARDED = 101, -101, -102
FINAL = {COMPLETED, CANCELLED, DISCARDED}

# How a call ended, as its client saw it. None: the client died before it could say.
COMMITTED, ROLLED_BACK, IN_DOUBT = "committed", "rolled back", "in doubt"
LOST, RAISED, RETURNED = "lost", "raised", "returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a consumer of the workload takes, and what it promises."""

    subject: str  # the first token of what it takes
    is_exact: bool = False  # its effects commit together with its acknowledgement
    is_strict: bool = False  # one task of a key after the other, in order
    has_cancel_handler: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One transaction of a publisher: business rows, and the events that tell of them."""

    events: frozenset[str]
    outcome: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """One call of a handler; ``who`` is its process."""

    consumer: str
    event: str
    task: int
    epoch: int
    verb: str  # handle or cancel
    who: str
    outcomes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What an operator was told about a verb: which tasks it has changed, by event."""

    verb: str
    consumer: str
    updated: frozenset[str]
    outcome: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    id: str
    subject: str
    schedule: str = ""
    occurrence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """A task; ``failures`` counts what its history says about attempts of the handler."""

    id: int
    consumer: str
    event: str
    state: int
    epoch: int
    attempts: int
    failures: int
    lost_leases: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A business row: ``published`` beside an event, ``done`` and ``undone`` beside an ack."""

    kind: str
    event: str
    consumer: str = ""
    epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known after a run. Effects are in the order in which they were written."""

    contracts: Mapping[str, Contract]
    publications: Sequence[Publication] = ()
    handlings: Sequence[Handling] = ()
    operations: Sequence[Operation] = ()
    events: Sequence[EventRow] = ()
    tasks: Sequence[TaskRow] = ()
    effects: Sequence[Effect] = ()
    leftovers: Sequence[str] = ()  # processes, connections and locks that outlived their owners
    is_durable: bool = True  # what was committed survives whatever happens to the server
    is_undisturbed: bool = False  # no fault was injected, so no lease may run out
    ids: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", frozenset(event.id for event in self.events))
