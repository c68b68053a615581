"""One self-contained page to look at the pictures of a batch with."""

from __future__ import annotations

from collections.abc import AsyncIterator

from evolink_async._ledger import Item

__all__ = ["write_gallery"]


async def write_gallery(items: AsyncIterator[Item], *, title: str) -> AsyncIterator[str]:
    """The page, in pieces."""
    yield title
    async for item in items:
        yield item.identity
