import pytest

from tests.faults.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_minute_of_random_faults_loses_and_doubles_nothing(seed: int):
    wrong = soak(60, seed).wrong
    assert not wrong, "\n".join(wrong)
