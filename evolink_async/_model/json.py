"""JSON text to values: faster, and no different, where msgspec is installed (extra ``fast``)."""

from __future__ import annotations

import json
from typing import Any, Final

from evolink_async._text import printable, shown
from evolink_async.errors import (
    InvalidResponseError,
)

try:
    import msgspec
except ImportError:
    msgspec = None  # type: ignore[assignment]  # so it is told apart

__all__ = ["MAX_DEPTH", "check_depth", "is_deep", "load_json", "loads", "parse_json", "unusable"]


def loads(text: bytes | str) -> Any:
    """As `json.loads`, which has the last word on whatever msgspec refuses.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested deeper than Python can hold.
    """
    if _decode is not None:
        try:
            return _decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass
    return json.loads(text)


_decode = msgspec.json.Decoder().decode if msgspec is not None else None


MAX_DEPTH: Final = 100
"""Levels of nesting: far beyond what the API sends, far below where Python gives up."""


def parse_json(body: bytes | str) -> Any:
    """*body* as JSON, whatever it is made of.

    Raises:
        InvalidResponseError: It is not JSON, too deep, or holds absurd numbers.
    """
    value = load_json(body)
    if _is_nested(body) and is_deep(value):
        raise InvalidResponseError(_TOO_DEEP, head=_head(body))
    return value


def load_json(body: bytes | str) -> Any:
    """The same without a look at its depth, for answers that are only partly used.

    Raises:
        InvalidResponseError: It is not JSON, or Python cannot hold it.
    """
    try:
        return loads(body)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError is a ValueError
        raise InvalidResponseError(
            f"the answer is not JSON: {printable(str(exc), 120)}", head=_head(body)
        ) from exc


_TOO_DEEP: Final = f"the answer is nested deeper than {MAX_DEPTH} levels"


def check_depth(task: object) -> None:
    """Nothing, if *task* can be used.

    Raises:
        InvalidResponseError: It is nested too deep.
    """
    if is_deep(task):
        raise unusable(task, _TOO_DEEP)


def _is_nested(body: bytes | str) -> bool:
    """False for a JSON text with too few brackets for more than `MAX_DEPTH` levels."""
    if isinstance(body, str):
        return body.count("{") + body.count("[") > MAX_DEPTH
    return body.count(b"{") + body.count(b"[") > MAX_DEPTH


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


def _head(body: bytes | str) -> str:
    text = body[:400].decode("utf-8", "replace") if isinstance(body, bytes) else body
    return printable(text, 200)


def unusable(value: object, why: str) -> InvalidResponseError:
    return InvalidResponseError(f"{why}: {shown(value, 120)}", head=shown(value, 200))
