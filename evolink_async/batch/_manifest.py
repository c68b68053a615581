"""The files written about a batch: manifest and gallery. They are generated: always replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from attrs import evolve

from evolink_async._files import sync_folder
from evolink_async._text import printable
from evolink_async.batch._files import present
from evolink_async.batch._gallery import write_gallery
from evolink_async.batch._ledger import Item, Ledger
from evolink_async.errors import LedgerError

__all__ = ["GALLERY", "MANIFEST", "gone", "write"]

MANIFEST: Final = "manifest.jsonl"
GALLERY: Final = "gallery.html"
_CHUNK: Final = 500
"""Items read from the ledger, and lines written, at once."""


async def _items(ledger: Ledger, folder: Path) -> AsyncIterator[Item]:
    """Every item that counts, with the files that are there."""
    async for item in ledger.items(limit=_CHUNK):
        if item.state == "saved" or not item.files:
            yield item
        else:
            yield evolve(item, files=await asyncio.to_thread(present, folder, item.files))


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


def gone(path: Path) -> str | None:
    """Says that a file that was written is missing; None if it is there."""
    if os.path.lexists(path):
        return None
    return (
        f"{printable(str(path))} was removed as soon as it was written; see what clears its folder"
    )


async def _replace(ledger: Ledger, path: Path) -> None:
    """Write it under a name that `sweep` knows, then give it its name, whatever has that now."""
    items = _items(ledger, path.parent)
    pieces = (
        _manifest_lines(items)
        if path.name == MANIFEST
        else write_gallery(items, title=path.parent.name)
    )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    file = await asyncio.to_thread(_create, draft)
    try:
        chunk: list[str] = []
        async for piece in pieces:
            chunk.append(piece)
            if len(chunk) >= _CHUNK:
                await asyncio.to_thread(file.write, "".join(chunk).encode())
                chunk.clear()
        await asyncio.to_thread(_publish, file, "".join(chunk).encode(), path)
    finally:
        await asyncio.to_thread(_discard, file)


def _create(draft: Path) -> BinaryIO:
    draft.parent.mkdir(parents=True, exist_ok=True)
    return draft.open("xb")


def _publish(file: BinaryIO, rest: bytes, path: Path) -> None:
    """See that the draft is on disk before it gets the name of what it replaces."""
    file.write(rest)
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)
    sync_folder(path.parent)


def _discard(file: BinaryIO) -> None:
    """Remove the draft, unless it has its name."""
    with contextlib.suppress(OSError):  # what is still in memory may find no room
        file.close()
    with contextlib.suppress(OSError):
        Path(file.name).unlink()
