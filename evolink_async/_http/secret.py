"""The API key, wrapped so that it does not show."""

from __future__ import annotations

import hashlib

__all__ = ["Secret"]

_MASK = "[API key]"
_SHORTEST = 8


class Secret:
    """A string that does not show when it is printed, logged or pickled."""

    __slots__ = ("_bytes", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        self._bytes = value.encode("utf-8", "surrogatepass")

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not pickled; pass it to the new process by its environment")

    def reveal(self) -> str:
        """The string itself."""
        return self._value

    def fingerprint(self, salt: bytes) -> bytes:
        """A hash of it with *salt* that is slow to guess from."""
        return hashlib.scrypt(self._bytes, salt=salt, n=2**12, r=8, p=1)

    def redact(self, text: str) -> str:
        """*text* without it, unless it is so short that it may be part of any word."""
        return text.replace(self._value, _MASK) if len(self._value) >= _SHORTEST else text

    def redact_bytes(self, data: bytes) -> bytes:
        """*data* without it."""
        if len(self._bytes) < _SHORTEST or self._bytes not in data:
            return data
        return data.replace(self._bytes, _MASK.encode())
