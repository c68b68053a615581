"""What `save` needs to know about a download: how to open a link, and what it yields."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from attrs import frozen

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


@frozen(kw_only=True)
class Stream:
    """A result whose download has begun.

    Attributes:
        offset: Position of the first byte; 0 if the host sends the whole result.
        total: Size of the whole result in bytes, None if unknown.
        etag: Strong entity tag to resume with, None if the host cannot resume.
        chunks: The bytes, in pieces as they arrive. Raises `TransientDownloadError` if the
            connection breaks, or is slower than the minimum rate.
    """

    offset: int
    total: int | None
    etag: str | None
    chunks: AsyncGenerator[bytes, None]


OpenResult = Callable[[str, int, str | None], AbstractAsyncContextManager[Stream]]
"""Opens a link, at an offset if the host can resume and the result still has the entity tag."""
