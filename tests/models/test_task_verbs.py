import pytest

from kanthorq_django.domain import states
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.models import Task, TaskState
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db

VERBS = ("cancel", "resume", "release", "reset")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", TaskState)
def test_each_verb_leaves_each_state_as_the_table_of_moves_says(verb: str, state: TaskState):
    task = TaskFactory.create(state=state)
    expected = states.targets(verb, state)

    outcome = getattr(Task.objects.filter(pk=task.pk), verb)()

    task.refresh_from_db()
    if expected:
        assert outcome == Outcome(updated=(task.event_id,))
        assert task.state == expected[0]
    else:
        assert outcome == Outcome(noop=(task.event_id,))
        assert task.state == state
