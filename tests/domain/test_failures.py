from typing import Any

import pytest

from kanthorq_django.domain.failures import LINE_SIZE_MAX, Failure, recorded
from tests.errors import Abort

SIZE_MAX = 16_384


def caught(error: BaseException) -> BaseException:
    """Return ``error`` as a handler would have left it: raised, with a traceback."""
    with pytest.raises(type(error)) as raised:
        raise error
    return raised.value


def failure_of(reason: BaseException | str, size_max: int = SIZE_MAX) -> Failure:
    return Failure.of(reason, stack_size_max=size_max)


def test_an_exception_leaves_its_name_its_text_and_its_traceback() -> None:
    failure = failure_of(caught(KeyError("order")))
    assert failure.error == "KeyError: 'order'"
    assert failure.stack.startswith("Traceback (most recent call last):\n")
    assert failure.stack.endswith("KeyError: 'order'\n")


def test_an_exception_without_text_leaves_its_name() -> None:
    assert failure_of(caught(TimeoutError())).error == "TimeoutError"


def test_a_reason_in_words_has_no_traceback() -> None:
    assert failure_of("The card was declined.") == Failure("The card was declined.")


def test_locals_stay_out_of_the_traceback() -> None:
    def pay() -> None:
        card = "4111-1111"
        raise ValueError(len(card))

    with pytest.raises(ValueError, match="9") as raised:
        pay()
    assert "4111-1111" not in failure_of(raised.value).stack.replace('"4111-1111"', "")


def test_the_cause_of_an_exception_is_told_too() -> None:
    error = ValueError("late")
    error.__cause__ = caught(OSError("disk"))
    assert "OSError: disk" in failure_of(caught(error)).stack


@pytest.mark.parametrize(
    "unsafe",
    [
        "\x00",
        "\x07",
        "\x1b[31m",
        "\x7f",
        "\x9b",
        "\u202e",
        "\u2066",
        "\ud800",
    ],
)
def test_what_a_database_a_log_or_a_page_cannot_take_is_replaced(unsafe: str) -> None:
    for failure in (failure_of(f"a{unsafe}b"), failure_of(caught(ValueError(f"a{unsafe}b")))):
        for text in (failure.error, failure.stack):
            assert unsafe[0] not in text
            text.encode()
        assert "a\N{REPLACEMENT CHARACTER}" in failure.error


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_the_error_is_one_line_whatever_ends_a_line(ending: str) -> None:
    failure = failure_of(caught(ValueError(f"first{ending}INFO forged line")))
    assert failure.error == "ValueError: first INFO forged line"


def test_other_text_is_left_as_it_is() -> None:
    assert failure_of("Größe 100 % 注文 🛒").error == "Größe 100 % 注文 🛒"


def test_a_long_text_is_cut_and_says_so() -> None:
    failure = failure_of("x" * (LINE_SIZE_MAX + 1))
    assert len(failure.error) == LINE_SIZE_MAX
    assert failure.error.endswith("x…")
    assert failure_of("x" * LINE_SIZE_MAX).error == "x" * LINE_SIZE_MAX


@pytest.mark.parametrize("size_max", [1, 2, 100])
def test_of_a_long_traceback_the_end_is_kept(size_max: int) -> None:
    failure = failure_of(caught(ValueError("y" * 1_000_000)), size_max)
    assert len(failure.stack) == size_max
    assert failure.stack[0] == "…"
    assert size_max < 2 or failure.stack.endswith("y\n"[-(size_max - 1) :])


def test_endless_recursion_leaves_a_traceback_of_bounded_size() -> None:
    def recurse() -> None:
        recurse()

    with pytest.raises(RecursionError) as raised:
        recurse()
    failure = failure_of(raised.value)
    assert failure.error.startswith("RecursionError: ")
    assert len(failure.stack) <= SIZE_MAX


def test_a_chain_of_ten_thousand_causes_is_cut_to_size() -> None:
    error: BaseException | None = None
    for number in range(10_000):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    assert error is not None
    failure = failure_of(error)
    assert failure.error == "ValueError: 9999"
    assert len(failure.stack) == SIZE_MAX


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, Abort])
def test_an_exception_whose_text_cannot_be_read_is_still_told_by_name(
    error: type[BaseException],
) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise error

    failure = failure_of(caught(MuteError()))
    assert failure.error.endswith("MuteError: (its text could not be read)")
    assert "Traceback" in failure.stack


def test_an_exception_whose_traceback_cannot_be_read_is_still_told() -> None:
    no_text: Any = 5  # where the line of the source belongs
    broken = SyntaxError("bad", ("template.html", 1, 1, no_text))
    failure = failure_of(caught(broken))
    assert failure.error.startswith("SyntaxError: bad")
    assert failure.stack


def test_an_interrupt_is_described_like_any_exception() -> None:
    assert failure_of(caught(SystemExit(3))).error == "SystemExit: 3"


@pytest.mark.parametrize(
    ("stored", "failures"),
    [
        ([], []),
        (None, []),
        ([{"error": "E", "stack": "S", "attempt": 1}], [("E", "S")]),
        (["text", 7, None], [("text", ""), ("7", ""), ("null", "")]),
        ([{"error": {"a": "ü"}, "stack": ["x"]}], [('{"a": "ü"}', '["x"]')]),
        ([{"stack": None}], [('{"stack": null}', "")]),
        ({"error": "E"}, [("E", "")]),
    ],
)
def test_what_was_recorded_reads_as_failures_whatever_it_is(
    stored: object, failures: list[tuple[str, str]]
) -> None:
    assert [(entry["error"], entry["stack"]) for entry in recorded(stored)] == failures


def test_what_was_recorded_with_an_error_is_kept() -> None:
    assert recorded([{"error": "E", "attempt": 1, "verb": "handle"}]) == [
        {"error": "E", "attempt": 1, "verb": "handle", "stack": ""}
    ]
