"""Lists of one JSON object that are filled by turns and may be longer than memory."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder

MEMORY_SIZE_MAX = 1 << 20  # bytes of one list that are held before they go to a file
CHUNK_SIZE = 1 << 16  # characters that are printed at once

_encode = DjangoJSONEncoder().encode


class JsonLists(ExitStack):
    """Each list waits in a file of its own for the ones before it to be printed."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._files = {name: self.enter_context(_spool()) for name in names}
        self._filled: set[str] = set()

    def append(self, name: str, value: Any) -> None:
        comma = "," if name in self._filled else ""
        self._files[name].write(f"{comma}\n    {_encode(value)}")
        self._filled.add(name)

    def printed(self, **head: Any) -> Iterator[str]:
        """Yield the text of the object, piece by piece: ``head``, then the lists."""
        yield json.dumps(head, indent=2).removesuffix("\n}")
        for name, file in self._files.items():
            yield f",\n  {_encode(name)}: ["
            file.seek(0)
            while text := file.read(CHUNK_SIZE):
                yield text
            yield "\n  ]" if name in self._filled else "]"
        yield "\n}"


def _spool() -> Any:
    return tempfile.SpooledTemporaryFile(MEMORY_SIZE_MAX, "w+", encoding="ascii")
