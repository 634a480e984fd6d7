import pytest

from kanthorq_django.domain import states
from kanthorq_django.domain.states import CLAIMABLE, FINAL, LEASED, MOVES, TaskState, targets

S = TaskState

VERBS = ("claim", "ack", "nack", "hand_back", "cancel", "resume", "release", "reset")
# The whole life of a task, written down a second time; what is not here is a no-op.
LIFE = {
    ("claim", S.AVAILABLE): {S.RUNNING},
    ("claim", S.RETRYABLE): {S.RUNNING},
    ("claim", S.RUNNING): {S.RUNNING, S.DISCARDED, S.CANCELLED, S.CANCELLING},
    ("claim", S.CANCELLING): {S.CANCELLING, S.CANCELLED, S.DISCARDED},
    ("ack", S.RUNNING): {S.COMPLETED},
    ("ack", S.CANCELLING): {S.CANCELLED},
    ("nack", S.RUNNING): {S.RETRYABLE, S.DISCARDED, S.CANCELLED, S.CANCELLING},
    ("nack", S.CANCELLING): {S.CANCELLING, S.DISCARDED},
    ("hand_back", S.RUNNING): {S.AVAILABLE, S.CANCELLED, S.CANCELLING},
    ("hand_back", S.CANCELLING): {S.CANCELLING},
    ("cancel", S.PENDING): {S.CANCELLED, S.CANCELLING},
    ("cancel", S.AVAILABLE): {S.CANCELLED, S.CANCELLING},
    ("cancel", S.RETRYABLE): {S.CANCELLED, S.CANCELLING},
    ("resume", S.DISCARDED): {S.AVAILABLE},
    ("resume", S.CANCELLED): {S.AVAILABLE},
    ("release", S.PENDING): {S.AVAILABLE},
    ("reset", S.COMPLETED): {S.AVAILABLE},
    ("reset", S.DISCARDED): {S.AVAILABLE},
    ("reset", S.CANCELLED): {S.AVAILABLE},
}


@pytest.mark.parametrize("state", TaskState)
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_leads_from_each_state_where_the_life_of_a_task_says(
    verb: str, state: TaskState
) -> None:
    assert set(targets(verb, state)) == LIFE.get((verb, state), set())


def test_the_table_of_moves_knows_these_verbs_and_no_others() -> None:
    assert {move.verb for move in MOVES} == set(VERBS)


def test_no_two_moves_of_a_verb_leave_the_same_state() -> None:
    left = [(move.verb, source) for move in MOVES for source in move.sources]
    assert len(left) == len(set(left))


def test_every_move_of_the_module_stands_in_the_table() -> None:
    moves = [value for value in vars(states).values() if isinstance(value, states.Move)]
    assert sorted(moves, key=MOVES.index) == list(MOVES)


def test_an_unknown_verb_leads_nowhere() -> None:
    assert targets("forget", S.RUNNING) == ()


@pytest.mark.parametrize("verb", VERBS)
def test_the_sources_of_a_verb_are_the_states_that_it_leads_from(verb: str) -> None:
    assert states.sources(verb) == {state for moved_by, state in LIFE if moved_by == verb}


def test_values_are_those_of_kanthorq() -> None:
    assert {state.name: state.value for state in TaskState} == {
        "PENDING": 0,
        "AVAILABLE": 1,
        "RUNNING": 2,
        "CANCELLING": 3,
        "COMPLETED": 101,
        "RETRYABLE": 102,
        "CANCELLED": -101,
        "DISCARDED": -102,
    }


def test_a_final_state_is_never_claimable_and_only_people_leave_it() -> None:
    assert FINAL.isdisjoint(CLAIMABLE)
    assert {verb for verb, state in LIFE if state in FINAL} == {"resume", "reset"}


def test_what_is_leased_can_be_claimed_once_its_lease_ran_out() -> None:
    assert LEASED < CLAIMABLE


def test_a_pending_task_waits_for_a_person() -> None:
    assert S.PENDING not in CLAIMABLE
    assert {verb for verb, state in LIFE if state == S.PENDING} == {"release", "cancel"}


def test_a_label_is_the_name_as_a_word() -> None:
    assert [state.label for state in (S.PENDING, S.CANCELLING)] == ["Pending", "Cancelling"]
