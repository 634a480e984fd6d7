from concurrent.futures import ThreadPoolExecutor

import pytest

from kanthorq_django.domain.interrupts import is_interrupt
from tests.errors import Abort


def test_ctrl_c_is_one() -> None:
    assert is_interrupt(KeyboardInterrupt())


def test_what_somebody_raises_in_another_thread_is_none() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(is_interrupt, KeyboardInterrupt()).result()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), Abort(), ValueError()])
def test_whatever_else_code_raises_is_none(error: BaseException) -> None:
    assert not is_interrupt(error)
