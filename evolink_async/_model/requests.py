"""Requests for generations, checked against the API's page before anything is sent.

Another image model is added here: `ImageRequest` has the fields, `_check_contract` the rules of
the one model whose page is known, ``wan2.5-text-to-image`` (https://docs.evolink.ai, image
series). Until its rules are here, a model can be asked for with ``validate=False``, or with a
`RawRequest` at any other endpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Self

from attrs import field, fields, frozen

from evolink_async._checks import refuse_field
from evolink_async._hosts import check_callback_url
from evolink_async._model.json import MAX_DEPTH, is_deep
from evolink_async._text import printable
from evolink_async.errors import RequestValidationError

__all__ = [
    "DEFAULT_MODEL",
    "IMAGES_PATH",
    "ImageRequest",
    "RawRequest",
    "as_request",
    "check_task_id",
    "is_task_id",
]

DEFAULT_MODEL: Final = "wan2.5-text-to-image"
IMAGES_PATH: Final = "/v1/images/generations"
_TASK_ID: Final = re.compile(r"[A-Za-z0-9._:-]{4,128}")


def check_task_id(task_id: object) -> str:
    """*task_id* itself, if it can be one: 4-128 characters of ``A-Za-z0-9._:-``.

    Raises:
        RequestValidationError: It cannot.
    """
    if isinstance(task_id, str) and is_task_id(task_id):
        return task_id
    raise refuse_field(
        "task_id", task_id, "4 to 128 characters of A-Z a-z 0-9 . _ : -, not dots alone"
    )


def is_task_id(text: str) -> bool:
    return _TASK_ID.fullmatch(text) is not None and text.strip(".") != ""


@frozen
class ImageRequest:
    """One image generation, checked against the API's page before anything is sent.

    Fields left at None are not sent; the API then applies its own default.

    Attributes:
        prompt: What to draw: 1 to 2000 characters. The API also counts tokens (at
            most 2000), so it may still refuse a shorter prompt.
        model: Model name; the page knows ``wan2.5-text-to-image`` only.
        size: ``"WIDTHxHEIGHT"`` in pixels: 768x768 to 1440x1440 pixels in total,
            width/height from 1/4 to 4, e.g. ``"1280x1280"``.
        n: Pictures to make: 1, 2 or 4. Charged in advance for *n*, finally for
            the pictures made.
        prompt_extend: Whether a language model may rewrite the prompt; the API's
            default is True.
        callback_url: https address the API POSTs the ended task to; at most 2048
            characters, no internal host.
        extra: Fields the page does not know yet, sent as they are.
        validate: False skips the checks of the page's rules: the API decides.

    Raises:
        RequestValidationError: A rule is broken; names field, value and rule.
    """

    prompt: str
    model: str = field(default=DEFAULT_MODEL, kw_only=True)
    size: str | None = field(default=None, kw_only=True)
    n: int | None = field(default=None, kw_only=True)
    prompt_extend: bool | None = field(default=None, kw_only=True)
    callback_url: str | None = field(default=None, kw_only=True)
    extra: Mapping[str, Any] = field(factory=dict, kw_only=True, hash=False)
    validate: bool = field(default=True, kw_only=True, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.extra or type(self.extra) is not dict:
            object.__setattr__(self, "extra", _private_copy("extra", self.extra, _BODY_FIELDS))
        if not isinstance(self.validate, bool):
            raise refuse_field("validate", self.validate, "True or False")
        if self.validate:
            _check_contract(self)
        for name in _BODY_FIELDS:
            value = getattr(self, name)
            if not (value is None or (type(value) is str and value.isascii())):
                _json_copy(name, value)

    @property
    def path(self) -> str:
        """Where it is POSTed to."""
        return IMAGES_PATH

    def _given(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name in _BODY_FIELDS if (value := getattr(self, name)) is not None}

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent: the fields given, and nothing else."""
        return {**self._given(), **self.extra}

    def to_json(self) -> dict[str, Any]:
        """This request as a JSON object that `from_json` reads back."""
        stored = self._given()
        if self.extra:
            stored["extra"] = dict(self.extra)
        if not self.validate:
            stored["validate"] = False
        return stored

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """A request from a mapping of its fields.

        Raises:
            RequestValidationError: A field is unknown, missing or not allowed.
        """
        _check_names(value, cls)
        if "prompt" not in value:
            raise refuse_field("prompt", None, "it is required")
        return cls(**value)


_BODY_FIELDS: Final = ("model", "prompt", "size", "n", "prompt_extend", "callback_url")


@frozen
class RawRequest:
    """A request to any other generation endpoint; its tasks are watched like all others.

    Example:
        ``RawRequest("/v1/videos/generations", body={"model": "...", "prompt": "..."})``

    Attributes:
        path: Path under the base URL: starts with one slash, no scheme, host,
            query, percent sign or dot segment.
        body: The JSON object to send, unchecked.

    Raises:
        RequestValidationError: *path* could lead elsewhere, or *body* is not a JSON object.
    """

    path: str
    body_fields: Mapping[str, Any] = field(kw_only=True, alias="body", hash=False)

    def __attrs_post_init__(self) -> None:
        segment = "/[A-Za-z0-9_~-][A-Za-z0-9._~-]*"
        if not isinstance(self.path, str) or not re.fullmatch(f"(?:{segment})+", self.path):
            raise refuse_field(
                "path", self.path, 'a plain absolute path such as "/v1/videos/generations"'
            )
        object.__setattr__(self, "body_fields", _private_copy("body", self.body_fields))

    @property
    def model(self) -> str:
        """The body's model, ``""`` if it names none."""
        return self._text("model") or ""

    @property
    def callback_url(self) -> str | None:
        """The body's callback URL, if any."""
        return self._text("callback_url")

    @property
    def prompt(self) -> str:
        """The body's prompt, ``""`` if it has none."""
        return self._text("prompt") or ""

    def _text(self, name: str) -> str | None:
        value = self.body_fields.get(name)
        return value if isinstance(value, str) else None

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return dict(self.body_fields)

    def to_json(self) -> dict[str, Any]:
        """This request as a JSON object that `from_json` reads back."""
        return {"path": self.path, "body": dict(self.body_fields)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """A request from ``{"path": ..., "body": {...}}``.

        Raises:
            RequestValidationError: A field is unknown, missing or not allowed.
        """
        if not isinstance(value, Mapping) or set(value) != {"path", "body"}:
            raise refuse_field("request", value, "a mapping of exactly the fields path and body")
        return cls(value["path"], body=value["body"])


def as_request(request: object, /, **given: Any) -> ImageRequest | RawRequest:
    """A request from what users write: a prompt with fields, a mapping, or a request.

    Raises:
        RequestValidationError: It is none of these, or breaks a rule of the API's page.
    """
    if isinstance(request, str):
        return (
            ImageRequest.from_json({"prompt": request, **given}) if given else ImageRequest(request)
        )
    if isinstance(request, Mapping):
        value = {**request, **given}
        return RawRequest.from_json(value) if "path" in value else ImageRequest.from_json(value)
    if isinstance(request, ImageRequest | RawRequest):
        if given:
            raise refuse_field(
                "request", request, "fields beside a prompt or mapping; a request has its own"
            )
        return request
    raise refuse_field(
        "request", request, "a prompt, a mapping of fields, ImageRequest or RawRequest"
    )


def _check_names(value: object, cls: type) -> None:
    if not isinstance(value, Mapping):
        raise refuse_field("request", value, "a mapping of field names to values")
    known = {f.name for f in fields(cls)}
    for name in value:
        if name not in known:
            raise RequestValidationError(
                f"{printable(str(name), 60)!r} is not a field of an image generation: use "
                f"{', '.join(sorted(known))}; fields the API has added since go into extra={{...}}",
                field=str(name),
                value=value[name],
                allowed=", ".join(sorted(known)),
            )


def _private_copy(name: str, value: object, reserved: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A copy of a JSON object, which later changes of *value* do not reach."""
    if not isinstance(value, Mapping):
        raise refuse_field(name, value, "a mapping of field names to JSON values")
    for key in value:
        if not isinstance(key, str) or key in reserved:
            raise refuse_field(name, key, "names that are strings and not a field of their own")
    copy: dict[str, Any] = _json_copy(name, dict(value))
    return copy


def _json_copy(name: str, value: object) -> Any:
    """*value* after a round trip through JSON; refuses what JSON or UTF-8 cannot hold."""
    try:
        text = json.dumps(value, allow_nan=False)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
        copy = json.loads(text)
    except (TypeError, ValueError, RecursionError) as exc:
        raise refuse_field(name, value, f"JSON values only ({printable(str(exc), 100)})") from exc
    if is_deep(copy):
        raise refuse_field(name, value, f"at most {MAX_DEPTH} levels of nesting")
    return copy


def _check_contract(request: ImageRequest) -> None:
    """Every rule the API's page states for ``wan2.5-text-to-image``."""
    if request.model != DEFAULT_MODEL:
        allowed = f"{DEFAULT_MODEL!r} is the model whose rules are known here"
        raise _breaks_rule("model", request.model, allowed)
    _check_prompt(request.prompt)
    if request.size is not None:
        _check_size(request.size)
    if request.n is not None and (type(request.n) is not int or request.n not in {1, 2, 4}):
        raise _breaks_rule("n", request.n, "1, 2 or 4")
    if request.prompt_extend is not None and not isinstance(request.prompt_extend, bool):
        raise refuse_field("prompt_extend", request.prompt_extend, "True or False")
    if request.callback_url is not None:
        url: object = request.callback_url
        reason = check_callback_url(url) if isinstance(url, str) else "it is not a string"
        if reason is not None:
            allowed = "an https URL of at most 2048 characters on a public host"
            raise refuse_field("callback_url", url, f"{allowed} ({reason})")


def _breaks_rule(field: str, value: object, allowed: str) -> RequestValidationError:
    """The error for a rule that the API may have relaxed; it says how to send it anyway."""
    return refuse_field(
        field,
        value,
        allowed,
        way_past="validate",
        advice="to let the API decide, pass validate=False",
    )


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise refuse_field("prompt", prompt, "a text that is not blank")
    if len(prompt) > 2000:
        raise _breaks_rule("prompt", prompt, f"at most 2000 characters, this has {len(prompt)}")


def _check_size(size: object) -> None:
    side = "([1-9][0-9]{0,4})"
    match = re.fullmatch(f"{side}x{side}", size) if isinstance(size, str) else None
    if match is None:
        raise refuse_field("size", size, 'WIDTHxHEIGHT in pixels, such as "1280x1280"')
    width, height = int(match[1]), int(match[2])
    least, most = 768 * 768, 1440 * 1440
    if not least <= width * height <= most:
        allowed = f"768x768 ({least}) to 1440x1440 ({most}) pixels in total"
        raise _breaks_rule("size", size, f"{allowed}, this has {width * height}")
    if not (width <= 4 * height and height <= 4 * width):
        raise _breaks_rule("size", size, "width/height from 1/4 to 4")
