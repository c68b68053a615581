"""The API as an OpenAPI 3.1 document, true to the contract page: ``openapi.json``.

What a schema cannot say, such as the number of pixels in a size, is in formats of our own:
``evolink-size``, ``evolink-callback-url``.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = ["document"]

_PATHS = {"batch": "/v1/tasks/batch", "list": "/v1/tasks"}
"""The path of each feature that has one of its own."""


def document(base_url: str, without: frozenset[str]) -> dict[str, Any]:
    """The document of an emulator at *base_url*, *without* some features."""
    text = files("evolink_async.emulator").joinpath("openapi.json").read_text(encoding="utf-8")
    api: dict[str, Any] = json.loads(text)
    api["servers"] = [{"url": base_url}]
    for feature, path in _PATHS.items():
        if feature in without:
            del api["paths"][path]
    return api
