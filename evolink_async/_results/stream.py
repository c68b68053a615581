"""What `save` needs to know about a download: how to open a link, and what it yields."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from evolink_async.errors import DownloadError

__all__ = ["OpenResult", "Stream", "TransientDownloadError"]


class TransientDownloadError(DownloadError):
    """A download failed in a way that another attempt may mend.

    It stays inside this folder: `save` tries again, and in the end raises `DownloadError`.

    Attributes:
        resumable: False if the next attempt must start at the first byte.
    """

    def __init__(self, message: str, *, resumable: bool = True, **data: Any) -> None:
        super().__init__(message, **data)
        self.resumable = resumable


class Stream(Protocol):
    """A result that has begun to arrive."""

    @property
    def offset(self) -> int:
        """Position of the first byte."""
        ...

    @property
    def total(self) -> int | None:
        """Size of the whole result in bytes, None if unknown."""
        ...

    @property
    def etag(self) -> str | None:
        """Strong entity tag, None if there is none."""
        ...

    @property
    def accepts_ranges(self) -> bool:
        """False if the host cannot resume a download."""
        ...

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes."""
        ...


class OpenResult(Protocol):
    """Opens a link, at byte *offset* if the host supports that."""

    def __call__(
        self, url: str, /, *, offset: int = 0, etag: str | None = None
    ) -> AbstractAsyncContextManager[Stream]:
        """The stream behind *url*."""
        ...
