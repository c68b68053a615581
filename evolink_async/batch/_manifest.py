"""The files written about a batch: manifest and gallery. They are generated: always replaced."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from evolink_async._text import printable
from evolink_async.batch._files import Draft, present
from evolink_async.batch._gallery import write_gallery
from evolink_async.batch._ledger import Item, Ledger
from evolink_async.errors import LedgerError

__all__ = ["GALLERY", "MANIFEST", "all_items", "gone", "write"]

MANIFEST: Final = "manifest.jsonl"
GALLERY: Final = "gallery.html"
_CHUNK: Final = 500
"""Items read from the ledger, and lines written, at once."""


async def all_items(ledger: Ledger, folder: Path, *states: str) -> AsyncIterator[Item]:
    """Every item that counts, or those in one of *states*, with the files that are there."""
    after = (0, 0)
    while page := await ledger.page(*states, after=after, limit=_CHUNK):
        for item in page:
            if item.state == "saved" or not item.files:
                yield item
            else:
                yield evolve(item, files=await asyncio.to_thread(present, folder, item.files))
        after = (page[-1].line, page[-1].number)


async def _manifest_lines(items: AsyncIterator[Item]) -> AsyncIterator[str]:
    async for item in items:
        yield json.dumps(_record(item)) + "\n"


def _record(item: Item) -> Mapping[str, Any]:
    snapshot = item.snapshot or {}
    return {
        "id": item.user_id,
        "line": item.line if item.wanted else None,
        "state": item.state,
        "request": item.request,
        "metadata": item.metadata,
        "files": [
            {"name": file.name, "sha256": file.sha256, "bytes": file.bytes} for file in item.files
        ],
        "task_id": item.task_id,
        "idempotency_key": item.idempotency_key,
        "credits": item.credits_used if item.credits_used is not None else item.credits_reserved,
        "duration": snapshot.get("duration"),
        "error": None if item.code is None else {"code": item.code, "message": item.message},
        "times": item.times,
    }


async def write(ledger: Ledger, path: Path) -> str | None:
    """Replace manifest or gallery as a whole; returns why not, with what to do, if not."""
    try:
        try:
            await _replace(ledger, path)
        except FileNotFoundError:
            # Its folder was removed meanwhile, perhaps with the ledger: then nothing else names
            # what was paid for. A draft makes the folder anew.
            await _replace(ledger, path)
    except OSError as exc:
        why = f"{exc.strerror or exc}; see to that"
    except LedgerError as exc:
        why = str(exc)
    else:
        return None
    return f"{printable(str(path))} cannot be written: {why}, then run the same batch again"


async def _replace(ledger: Ledger, path: Path) -> None:
    draft = Draft(path)
    await asyncio.to_thread(draft.open)
    try:
        await _fill(draft, ledger)
        await asyncio.to_thread(draft.publish)
    finally:
        await asyncio.to_thread(draft.discard)


def gone(path: Path) -> str | None:
    """Says that a file that was written is missing; None if it is there."""
    if os.path.lexists(path):
        return None
    return (
        f"{printable(str(path))} was removed as soon as it was written; see what clears its folder"
    )


async def _fill(draft: Draft, ledger: Ledger) -> None:
    items = all_items(ledger, draft.path.parent)
    pieces = (
        _manifest_lines(items)
        if draft.path.name == MANIFEST
        else write_gallery(items, title=draft.path.parent.name)
    )
    chunk: list[str] = []
    async for piece in pieces:
        chunk.append(piece)
        if len(chunk) >= _CHUNK:
            await asyncio.to_thread(draft.write, "".join(chunk))
            chunk.clear()
    await asyncio.to_thread(draft.write, "".join(chunk))
