"""The API key, wrapped so that it does not show."""

from __future__ import annotations

__all__ = ["Secret"]


class Secret:
    """A string that shows itself to nobody who prints, logs or pickles it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not pickled; pass it to the new process by its environment")

    def reveal(self) -> str:
        """The string itself."""
        return self._value

    def redact(self, text: str) -> str:
        """*text* without it."""
        return text.replace(self._value, "[API key]")
