"""Makes text from outside safe to print: no control characters, bounded length."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

__all__ = ["lines_of", "printable", "shown"]

_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that move the cursor, reorder text or cannot be encoded."""


def printable(text: str, limit: int = 300) -> str:
    """*text* on one line, without terminal control sequences, at most *limit* characters."""
    head = text[: limit + 1]
    shown = "".join(" " if unicodedata.category(c) in _UNSHOWN else c for c in head)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def shown(value: object, limit: int = 80) -> str:
    """The `repr` of any value, safe to print; the name of its type if it has no repr."""
    try:
        return printable(repr(value), limit)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
        return f"<{type(value).__name__}>"


def lines_of(ids: Sequence[str], size: int = 50) -> Iterator[str]:
    """*ids* as lines for the log, *size* ids a line."""
    return (", ".join(ids[k : k + size]) for k in range(0, len(ids), size))
