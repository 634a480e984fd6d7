"""Stdout and stderr: full, closed, or without a reader, they stop no work that is under way."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from django.core.management.base import OutputWrapper


class Output:
    """Writes until that fails, and nothing from then on; ``loss`` is what it failed with."""

    def __init__(self, stream: OutputWrapper) -> None:
        self._stream = stream
        self.loss: OSError | None = None

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str, *, ending: str = "\n") -> None:
        self._attempt(partial(self._write, text, ending))

    def flush(self) -> None:
        """Write what is buffered; until then ``loss`` cannot speak of it."""
        if not self._is_closed:
            self._attempt(self._stream.flush)

    def _attempt(self, output: Callable[[], None]) -> None:
        if self.loss is not None:
            return
        try:
            output()
        except OSError as error:
            self.loss = error
            self._discard_buffer()

    def _write(self, text: str, ending: str) -> None:
        if self._is_closed:
            raise OSError("it is closed")
        # As it is: Django would paint all of stderr as errors.
        self._stream.write(text, str, ending)

    @property
    def _is_closed(self) -> bool:
        stream: Any = self._stream
        # None is what Python makes of a stream that was closed before it started.
        return stream._out is None or getattr(stream._out, "closed", False)

    def _discard_buffer(self) -> None:
        """Lead to nowhere what the interpreter flushes once more on its way out."""
        stream: Any = self._stream
        if stream._out not in (sys.stdout, sys.stderr):
            return  # a caller's own, who sees to it
        with suppress(OSError, AttributeError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
