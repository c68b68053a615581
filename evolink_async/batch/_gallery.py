"""One self-contained page to look at the pictures of a batch with.

It opens from disk, asks nobody for anything, and runs no script but its own: prompts and
all else from outside travel as JSON and are only ever shown as text. Its parts are the files
``gallery.html``, ``gallery.css`` and ``gallery.js`` beside this one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from string import Template
from typing import Any, Final
from urllib.parse import quote

from evolink_async.batch._rows import Item

__all__ = ["write_gallery"]

_ESCAPES: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


async def write_gallery(items: AsyncIterator[Item], *, title: str) -> AsyncIterator[str]:
    """The page, in pieces: one line per item, so that it may be of any length."""
    head, tail = _around_items(title)
    yield head
    separator = "\n"
    async for item in items:
        yield separator + _safe(_facts(item))
        separator = ",\n"
    yield tail


def _around_items(title: str) -> tuple[str, str]:
    """What stands before the items, and what behind them."""
    style, script = _file("gallery.css"), _file("gallery.js")
    values = {"title": html.escape(title), "style": style, "script": script}
    values["policy"] = (  # only this page's own style and script; pictures from beside it
        f"default-src 'none'; img-src 'self' file:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    before, _, after = _file("gallery.html").partition("$items")
    return Template(before).substitute(values), Template(after).substitute(values)


def _file(name: str) -> str:
    return files("evolink_async.batch").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _safe(value: object) -> str:
    """JSON that cannot end the element it stands in, whatever strings it holds."""
    text = json.dumps(value, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _facts(item: Item) -> dict[str, Any]:
    """What the page shows of *item*; facts that are not known are left out."""
    body: Mapping[str, Any] = item.request.get("body", item.request)
    snapshot = item.snapshot or {}
    credits_ = item.credits_used if item.credits_used is not None else item.credits_reserved
    facts = {
        "state": item.state,
        "prompt": str(body.get("prompt") or ""),
        "files": [quote(file.name) for file in item.files],
        "id": item.user_id,
        "line": item.line if item.wanted else None,
        "model": item.model,
        "size": body.get("size"),
        "credits": credits_,
        "seconds": snapshot.get("duration"),
        "task": item.task_id,
        "saved": item.times.get("saved"),
        "key": item.idempotency_key if item.state == "uncertain" else None,
        "code": item.code,
        "reason": item.message,
        "more": item.metadata or None,
    }
    return {name: value for name, value in facts.items() if value is not None}
