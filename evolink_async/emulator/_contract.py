"""The rules of the API's pages for a submit, and the errors for a submit that breaks them.

Rules marked [C] are those of the ``wan2.5-text-to-image`` page. The other generation endpoints
and models are generic: a model, and optionally a prompt and a callback.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen

from evolink_async.emulator._errors import ApiError

__all__ = [
    "IDEMPOTENCY_KEY",
    "MODEL",
    "OTHER_IMAGE_MODELS",
    "TASK_ID",
    "Submission",
    "read_submission",
]

MODEL = "wan2.5-text-to-image"
OTHER_IMAGE_MODELS = ("wan2.5-image-to-image",)
TASK_ID = re.compile(r"[A-Za-z0-9._:-]{4,128}")
IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}")

_PROMPT_LIMIT = 2000
_URL_LENGTH = 2048
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_LEAST_PIXELS, _MOST_PIXELS = 768 * 768, 1440 * 1440
_DEFAULT_SIZE = (1280, 1280)
_COUNTS = (1, 2, 4)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAMES = ("localhost", "local", "internal", "lan", "home.arpa")


@frozen
class Submission:
    """A submit that follows the rules.

    Attributes:
        type: ``image``, ``video``, ``audio``.
        model: As sent.
        prompt: As sent; empty for a generic task without one.
        size: Width and height in pixels.
        n: How many results were ordered.
        callback_url: As sent.
    """

    type: str
    model: str
    prompt: str
    size: tuple[int, int] = _DEFAULT_SIZE
    n: int = 1
    callback_url: str | None = None


def read_submission(kind: str, body: dict[str, Any], image_models: tuple[str, ...]) -> Submission:
    """The submission in a JSON *body* for the endpoint of type *kind*.

    Raises:
        ApiError: 400 for a broken rule, 404 for an unknown model.
    """
    model = _string(body, "model")
    if kind == "image" and model not in (MODEL, *image_models):
        raise ApiError(404, f"model {model[:100]!r} not found", param="model")
    strict = kind == "image" and model == MODEL
    if not isinstance(body.get("prompt_extend", False), bool):
        raise ApiError(400, "prompt_extend must be true or false", param="prompt_extend")
    return Submission(
        type=kind,
        model=model,
        prompt=_prompt(body, required=strict),
        size=_size(body["size"]) if kind == "image" and "size" in body else _DEFAULT_SIZE,
        n=_count(body, allowed=_COUNTS if strict else (1, 2, 3, 4)),
        callback_url=_callback_url(body["callback_url"]) if "callback_url" in body else None,
    )


def _string(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} is required and must be a non-empty string", param=name)
    return value


def _prompt(body: dict[str, Any], *, required: bool) -> str:
    if not required and "prompt" not in body:
        return ""
    prompt = _string(body, "prompt")
    # A stand-in for the service's tokenizer: three UTF-8 bytes a token, rounded up.
    tokens = -(-len(prompt.encode("utf-8", "surrogatepass")) // 3)
    for count, unit in ((len(prompt), "characters"), (tokens, "tokens")):
        if count > _PROMPT_LIMIT:
            words = f"prompt has {count} {unit}, at most {_PROMPT_LIMIT} are allowed"
            raise ApiError(400, words, param="prompt")
    return prompt


def _size(value: Any) -> tuple[int, int]:
    """Width and height of a ``size`` [C]."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ApiError(400, "size must look like 1280x1280", param="size")
    width, height = int(match[1]), int(match[2])
    if not _LEAST_PIXELS <= width * height <= _MOST_PIXELS:
        raise ApiError(400, "size must have 768x768 to 1440x1440 pixels in total", param="size")
    if width > 4 * height or height > 4 * width:
        raise ApiError(400, "size must have an aspect ratio from 1/4 to 4", param="size")
    return width, height


def _count(body: dict[str, Any], *, allowed: tuple[int, ...]) -> int:
    n = body.get("n", 1)
    # 2.0 is an integer in JSON; true is none, though it equals 1 in Python.
    if isinstance(n, bool) or n not in allowed:
        raise ApiError(400, f"n must be one of {', '.join(map(str, allowed))}", param="n")
    return int(n)


def _callback_url(value: Any) -> str:
    """A ``callback_url`` [C]: https, no internal address, at most 2048 characters."""
    if not isinstance(value, str) or len(value) > _URL_LENGTH:
        words = f"callback_url must be a URL of at most {_URL_LENGTH} characters"
        raise ApiError(400, words, param="callback_url")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ApiError(400, "callback_url is not a URL", param="callback_url") from None
    if parts.scheme != "https" or not host or re.search(r"[\s\x00-\x1f\x7f]", value):
        raise ApiError(400, "callback_url must be an https URL", param="callback_url")
    if _is_internal(host):
        raise ApiError(400, "callback_url must not name an internal address", param="callback_url")
    return value


def _is_internal(host: str) -> bool:
    address = _address(host)
    if address is None:
        name = host.rstrip(".").lower()
        return any(name == local or name.endswith("." + local) for local in _LOCAL_NAMES)
    return not address.is_global or address.is_multicast


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address *host* spells, also in the ways only resolvers read, such as ``127.1``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError, ValueError):
            return None
    if isinstance(address, ipaddress.IPv6Address):
        return _inner(address) or address
    return address


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside one that is mapped, 6to4 or NAT64."""
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour
