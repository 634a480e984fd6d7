"""Foreign values in error messages: on one short line, whatever they are."""

import reprlib

SIZE_MAX = 80  # characters


class _Quoter(reprlib.Repr):
    """Looks at the first few parts alone, so that a huge value costs no more than a small one."""

    def __init__(self) -> None:
        super().__init__()
        # reprlib cuts out the middle. It is left more than is shown, so that only the end is cut.
        self.maxstring = self.maxother = self.maxlong = 4 * SIZE_MAX

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to spell out what has thousands of digits.
        limit = 1 << 1_024
        return super().repr_int(x, level) if -limit < x < limit else f"<{x.bit_length()} bits>"


_quoter = _Quoter()


def quoted(value: object) -> str:
    """Return ``value`` as code would write it, in ASCII, cut.

    Never raises: a value whose own text cannot be had is told by its type.
    """
    try:
        text = repr(value[:SIZE_MAX]) if isinstance(value, str) else _quoter.repr(value)
    except Exception:  # noqa: BLE001  # its __repr__ is foreign code
        text = f"<{type(value).__name__}>"
    text = text[: SIZE_MAX + 3]
    line = cut(
        "".join(each if " " <= each <= "~" else ascii(each)[1:-1] for each in text), SIZE_MAX + 2
    )
    is_cut = isinstance(value, str) and len(value) > SIZE_MAX and not line.endswith("…")
    return f"{line}…" if is_cut else line


def printable(text: str, size_max: int = SIZE_MAX) -> str:
    """Return ``text`` cut, with what is not printable spelled out."""
    if not text.isprintable():
        start = text[:size_max]
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in start)
    return cut(text, size_max)


def cut(text: str, size_max: int) -> str:
    """Return ``text``, or its beginning and an ellipsis, in at most ``size_max`` characters."""
    return text if len(text) <= size_max else f"{text[: size_max - 1]}…"
