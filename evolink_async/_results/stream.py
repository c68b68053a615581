"""What saving needs of a result that is being fetched."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from evolink_async.errors import DownloadError

__all__ = ["Interrupted", "OpenResult", "Stream"]


class Interrupted(DownloadError):  # noqa: N818 - an event in a download, rarely its end
    """A download that broke off, or could not begin, for a reason that may pass.

    Never leaves this package: `save` tries again, and in the end raises `DownloadError`.

    Attributes:
        restart: True if what has been received so far cannot be continued.
    """

    def __init__(self, message: str, *, restart: bool = False, **data: Any) -> None:
        super().__init__(message, **data)
        self.restart = restart


class Stream(Protocol):
    """A result that has begun to arrive."""

    @property
    def offset(self) -> int:
        """Position of the first byte."""
        ...

    @property
    def total(self) -> int | None:
        """Bytes of the whole result, if known."""
        ...

    @property
    def etag(self) -> str | None:
        """Strong entity tag, if any."""
        ...

    @property
    def accepts_ranges(self) -> bool:
        """False if it cannot be resumed."""
        ...

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes."""
        ...


class OpenResult(Protocol):
    """Opens a link, from a byte on where the host can."""

    def __call__(
        self, url: str, /, *, offset: int = 0, etag: str | None = None
    ) -> AbstractAsyncContextManager[Stream]:
        """The stream behind *url*."""
        ...
