"""What every refusal owes to the one who reads it: one sentence, short, and safe to print."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.core.exceptions import ValidationError

SENTENCE_SIZE_MAX = 700  # characters


def assert_sentence(error: BaseException) -> None:
    """Fail unless what ``error`` says is one short line that no terminal stumbles over."""
    texts = error.messages if isinstance(error, ValidationError) else [str(error)]
    for text in texts:
        assert text.strip(), f"{type(error).__name__} says nothing"
        assert text.isprintable(), f"{type(error).__name__} is not printable: {text!a:.300}"
        assert len(text) <= SENTENCE_SIZE_MAX, f"{len(text)} characters: {text!a:.300}"


@contextmanager
def refusals(*errors: type[BaseException]) -> Iterator[list[BaseException]]:
    """Let one of ``errors`` end the block, if it is told in a sentence; it is in the list then."""
    refused: list[BaseException] = []
    try:
        yield refused
    except errors as error:
        assert_sentence(error)
        refused.append(error)
