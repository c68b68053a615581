"""JSON text to values: faster, and no different, where msgspec is installed (extra ``fast``)."""

from __future__ import annotations

import json
from typing import Any, Final

from evolink_async._text import printable, shown
from evolink_async.errors import InvalidResponseError

try:
    import msgspec
except ImportError:
    msgspec = None  # type: ignore[assignment]  # so it is told apart

__all__ = [
    "MAX_DEPTH",
    "check_depth",
    "dump",
    "is_deep",
    "loads",
    "parse_items",
    "parse_json",
    "unusable",
]


def loads(text: bytes | str) -> Any:
    """As `json.loads`, which has the last word on whatever msgspec refuses.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested deeper than Python can hold.
    """
    if msgspec is not None:
        try:
            return msgspec.json.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass
    return json.loads(text)


MAX_DEPTH: Final = 100
"""Levels of nesting: far beyond what the API sends, far below where Python gives up."""


def parse_json(body: bytes) -> Any:
    """*body* as JSON, whatever it is made of.

    Raises:
        InvalidResponseError: It is not JSON, too deep, or holds absurd numbers.
    """
    value = _load(body)
    check_depth(value, body)
    return value


def parse_items(body: bytes, name: str) -> list[tuple[Any, bytes | None]]:
    """The items of the list *name* of a JSON object, each with its own JSON text.

    The text is None where only writing the item anew would give it. How deep an item is
    nested is not checked: one that is too deep must not spoil the others.

    Raises:
        InvalidResponseError: It is not JSON, or has no such list.
    """
    value = _load(body)
    items = value.get(name) if type(value) is dict else None
    if type(items) is not list:
        raise InvalidResponseError(f"the answer has no list named {name}", head=_head(body))
    texts = _texts(body, name) if msgspec is not None else None
    if texts is None:
        return [(item, None) for item in items]
    return list(zip(items, texts, strict=True))


def _texts(body: bytes, name: str) -> list[bytes] | None:
    """The texts of the items, None where msgspec does not take what `json` takes."""
    try:
        whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return [bytes(text) for text in msgspec.json.decode(whole[name], type=list[msgspec.Raw])]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _load(body: bytes) -> Any:
    try:
        return loads(body)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError is a ValueError
        raise InvalidResponseError(
            f"the answer is not JSON: {printable(str(exc), 120)}", head=_head(body)
        ) from exc


def dump(value: dict[str, Any]) -> bytes:
    """*value* as JSON text.

    Raises:
        InvalidResponseError: Python cannot write it.
    """
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as exc:
        raise InvalidResponseError("the task cannot be kept as JSON") from exc


def check_depth(value: object, text: bytes = b"") -> None:
    """Nothing, if *value* can be used; *text* is its JSON text, if that is at hand.

    Raises:
        InvalidResponseError: It is nested too deep.
    """
    # Counting is quick: a text with so few brackets cannot be deep.
    if text and text.count(b"{") + text.count(b"[") <= MAX_DEPTH:
        return
    if is_deep(value):
        raise unusable(value, f"the answer is nested deeper than {MAX_DEPTH} levels")


def is_deep(value: object) -> bool:
    """True for a JSON value of more than `MAX_DEPTH` levels."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return False
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)  # type: ignore[attr-defined]  # what else contains
            if type(child) in _CONTAINERS
        ]
    return bool(level)


_CONTAINERS: Final = frozenset({dict, list})


def _head(body: bytes) -> str:
    return printable(body[:400].decode("utf-8", "replace"), 200)


def unusable(value: object, why: str) -> InvalidResponseError:
    return InvalidResponseError(f"{why}: {shown(value, 120)}", head=shown(value, 200))
