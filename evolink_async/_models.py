"""The values a user meets: requests, snapshots, results. Frozen, checked, without I/O.

Wire facts are those of the API's page for ``wan2.5-text-to-image``
(https://docs.evolink.ai, image series) unless a docstring says "observed".
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

from attrs import field, fields, frozen

from evolink_async._hosts import check_callback_url
from evolink_async._json import loads
from evolink_async._text import printable, shown
from evolink_async.errors import (
    ConfigurationError,
    InvalidResponseError,
    RequestValidationError,
)

__all__ = [
    "DEFAULT_MODEL",
    "IMAGES_PATH",
    "RUNNING",
    "TERMINAL",
    "Credits",
    "GenerationResult",
    "ImageRequest",
    "Page",
    "RawRequest",
    "TaskSnapshot",
    "TaskSummary",
    "Timeout",
    "Usage",
    "as_request",
    "check_depth",
    "check_task_id",
    "load_json",
    "parse_json",
]

DEFAULT_MODEL: Final = "wan2.5-text-to-image"
IMAGES_PATH: Final = "/v1/images/generations"

RUNNING: Final = frozenset({"pending", "processing"})
TERMINAL: Final = frozenset({"completed", "failed", "cancelled"})

RESUBMITTABLE: Final = frozenset(
    {
        "generation_timeout",
        "quota_exceeded",
        "resource_exhausted",
        "service_error",
        "service_unavailable",
    }
)
"""Task error codes after which the same request may succeed later (API page on error codes)."""

_PROMPT_LIMIT: Final = 2000
_MOST: Final = 1e9
"""No task costs more: what says so is a mistake."""
_MAX_DEPTH: Final = 100
"""Levels of nesting: far beyond what the API sends, far below where Python gives up."""
_MIN_PIXELS: Final = 768 * 768
_MAX_PIXELS: Final = 1440 * 1440
_SIZE: Final = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_TASK_ID: Final = re.compile(r"[A-Za-z0-9._:-]{4,128}")
_PATH: Final = re.compile(r"/[A-Za-z0-9_~-][A-Za-z0-9._~-]*(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")


def parse_json(body: bytes | str) -> Any:
    """*body* as JSON, whatever it is made of.

    Raises:
        InvalidResponseError: It is not JSON, too deep, or holds absurd numbers.
    """
    value = load_json(body)
    if _is_nested(body) and _is_deep(value):
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


_TOO_DEEP: Final = f"the answer is nested deeper than {_MAX_DEPTH} levels"


def check_depth(task: object) -> None:
    """Nothing, if *task* can be used.

    Raises:
        InvalidResponseError: It is nested too deep.
    """
    if _is_deep(task):
        raise _unusable(task, _TOO_DEEP)


def _is_nested(body: bytes | str) -> bool:
    """False for a JSON text with too few brackets for more than `_MAX_DEPTH` levels."""
    if isinstance(body, str):
        return body.count("{") + body.count("[") > _MAX_DEPTH
    return body.count(b"{") + body.count(b"[") > _MAX_DEPTH


def _is_deep(value: object) -> bool:
    """True for a JSON value of more than `_MAX_DEPTH` levels."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(_MAX_DEPTH + 1):
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


def check_task_id(task_id: object) -> str:
    """*task_id* itself, if it looks like one: 4-128 characters of ``A-Za-z0-9._:-``.

    Raises:
        RequestValidationError: It does not.
    """
    if isinstance(task_id, str) and _is_task_id(task_id):
        return task_id
    raise _refuse("task_id", task_id, "4 to 128 characters of A-Z a-z 0-9 . _ : -, not dots alone")


def _is_task_id(text: str) -> bool:
    return _TASK_ID.fullmatch(text) is not None and text.strip(".") != ""


def _refuse(name: str, value: object, allowed: str, hint: str = "") -> RequestValidationError:
    return RequestValidationError(
        f"{name}={shown(value)} is not allowed: {allowed}{hint}",
        field=name,
        value=value,
        allowed=allowed,
    )


_UNCHECKED_HINT = "; to let the API decide, pass validate=False"


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
            raise _refuse("validate", self.validate, "True or False")
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
        """The page's fields that are not left to the API."""
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
            raise _refuse("prompt", None, "it is required")
        return cls(**value)


_BODY_FIELDS: Final = ("model", "prompt", "size", "n", "prompt_extend", "callback_url")


@frozen
class RawRequest:
    """A request to any other generation endpoint; its tasks live and are polled alike.

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
        if not isinstance(self.path, str) or not _PATH.fullmatch(self.path):
            raise _refuse(
                "path", self.path, 'a plain absolute path such as "/v1/videos/generations"'
            )
        object.__setattr__(self, "body_fields", _private_copy("body", self.body_fields))

    @property
    def model(self) -> str:
        """The body's model, ``""`` if it names none."""
        model = self.body_fields.get("model")
        return model if isinstance(model, str) else ""

    @property
    def callback_url(self) -> str | None:
        """The body's callback URL, if any."""
        url = self.body_fields.get("callback_url")
        return url if isinstance(url, str) else None

    @property
    def prompt(self) -> str:
        """The body's prompt, ``""`` if it has none."""
        prompt = self.body_fields.get("prompt")
        return prompt if isinstance(prompt, str) else ""

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
            raise _refuse("request", value, "a mapping of exactly the fields path and body")
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
            raise _refuse(
                "request", request, "fields beside a prompt or mapping; a request has its own"
            )
        return request
    raise _refuse("request", request, "a prompt, a mapping of fields, ImageRequest or RawRequest")


def _check_names(value: object, cls: type) -> None:
    if not isinstance(value, Mapping):
        raise _refuse("request", value, "a mapping of field names to values")
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
    """A copy of a JSON object nobody else can change."""
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "a mapping of field names to JSON values")
    for key in value:
        if not isinstance(key, str) or key in reserved:
            raise _refuse(name, key, "names that are strings and not a field of their own")
    copy: dict[str, Any] = _json_copy(name, dict(value))
    return copy


def _json_copy(name: str, value: object) -> Any:
    """*value* as JSON brings it back; refuses what JSON, or UTF-8, cannot say."""
    try:
        text = json.dumps(value, allow_nan=False)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
        copy = json.loads(text)
    except (TypeError, ValueError, RecursionError) as exc:
        raise _refuse(name, value, f"JSON values only ({printable(str(exc), 100)})") from exc
    if _is_deep(copy):
        raise _refuse(name, value, f"at most {_MAX_DEPTH} levels of nesting")
    return copy


def _check_contract(request: ImageRequest) -> None:
    """Every rule the API's page states for ``wan2.5-text-to-image``."""
    if request.model != DEFAULT_MODEL:
        allowed = f"{DEFAULT_MODEL!r} is the model whose rules are known here"
        raise _refuse("model", request.model, allowed, _UNCHECKED_HINT)
    _check_prompt(request.prompt)
    if request.size is not None:
        _check_size(request.size)
    if request.n is not None and (type(request.n) is not int or request.n not in {1, 2, 4}):
        raise _refuse("n", request.n, "1, 2 or 4", _UNCHECKED_HINT)
    if request.prompt_extend is not None and not isinstance(request.prompt_extend, bool):
        raise _refuse("prompt_extend", request.prompt_extend, "True or False")
    if request.callback_url is not None:
        _check_callback(request.callback_url)


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise _refuse("prompt", prompt, "a text that is not blank")
    if len(prompt) > _PROMPT_LIMIT:
        raise _refuse(
            "prompt",
            prompt,
            f"at most {_PROMPT_LIMIT} characters, this has {len(prompt)}",
            _UNCHECKED_HINT,
        )


def _check_size(size: object) -> None:
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise _refuse("size", size, 'WIDTHxHEIGHT in pixels, such as "1280x1280"')
    width, height = int(match[1]), int(match[2])
    if not _MIN_PIXELS <= width * height <= _MAX_PIXELS:
        allowed = f"768x768 ({_MIN_PIXELS}) to 1440x1440 ({_MAX_PIXELS}) pixels in total"
        raise _refuse("size", size, f"{allowed}, this has {width * height}", _UNCHECKED_HINT)
    if not (width <= 4 * height and height <= 4 * width):
        raise _refuse("size", size, "width/height from 1/4 to 4", _UNCHECKED_HINT)


def _check_callback(url: object) -> None:
    reason = check_callback_url(url) if isinstance(url, str) else "it is not a string"
    if reason is not None:
        allowed = "an https URL of at most 2048 characters on a public host"
        raise _refuse("callback_url", url, f"{allowed} ({reason})")


# ---------------------------------------------------------------------------------------------
# What comes back


def _number(value: object) -> float | None:
    """A finite JSON number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _amount(value: object) -> float | None:
    """What one task may cost; None for anything else, which would undo every sum it enters."""
    number = _number(value)
    return number if number is not None and 0 <= number <= _MOST else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@frozen(kw_only=True)
class Usage:
    """What a task reserved and cost, in credits; None where the API did not say.

    A number that is negative or above 1e9 is no cost, and counts as not said.

    Attributes:
        credits_reserved: Held when the task was accepted; may be fractional.
        credits_used: Finally charged (observed).
        cost: Finally charged, in the account's currency (observed).
        billing_rule: ``per_call``, ``per_token`` or ``per_second``.
        user_group: The account's price group.
    """

    credits_reserved: float | None = None
    credits_used: float | None = None
    cost: float | None = None
    billing_rule: str | None = None
    user_group: str | None = None

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what can be read; anything of an unexpected type counts as absent."""
        given = _object(value)
        return cls(
            credits_reserved=_amount(given.get("credits_reserved")),
            credits_used=_amount(given.get("credits_used")),
            cost=_amount(given.get("cost")),
            billing_rule=_text(given.get("billing_rule")),
            user_group=_text(given.get("user_group")),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields the API gave, as it names them."""
        names = ("credits_reserved", "credits_used", "cost", "billing_rule", "user_group")
        return {k: getattr(self, k) for k in names if getattr(self, k) is not None}


def _respelled(body: bytes | str) -> str:
    """A body without its accidents of white space and encoding, to compare by."""
    return json.dumps(json.loads(body))


class Page:
    """A batch answer, kept once for all of its tasks that go on.

    Thousands of them are read a second and hardly any is looked at: nothing is made of it
    before somebody asks.

    With many tasks running the bodies are most of what they hold: beyond `_ROOM` bytes of
    them in this process, new ones are kept compressed.
    """

    __slots__ = ("_body", "_index", "_packed", "_parse", "_read")
    _plain = 0

    def __init__(
        self,
        body: bytes,
        read: Callable[[bytes], PageIndex] = lambda _: {},
        parse: Callable[[bytes, int], Any] = lambda body, place: load_json(body)["data"][place],
    ) -> None:
        """A page of the answer *body*.

        *read* finds the tasks in it when somebody asks, *parse* parses the one at a place.
        """
        self._read = read
        self._parse = parse
        self._index: PageIndex | None = None
        self._packed = Page._plain > _ROOM
        self._body = zlib.compress(body, 1) if self._packed else body
        if not self._packed:
            Page._plain += len(body)

    def __del__(self) -> None:
        if not self._packed:
            Page._plain -= len(self._body)

    def __reduce__(self) -> tuple[Any, ...]:
        return Page, (self._text(),)

    def _text(self) -> bytes:
        return zlib.decompress(self._body) if self._packed else self._body

    def task(self, place: int) -> dict[str, Any]:
        """The task at *place* of the answer's ``data``, parsed anew."""
        task: dict[str, Any] = self._parse(self._text(), place)
        return task

    def snapshot(self, task_id: str) -> TaskSnapshot:
        """What the answer says of a task that goes on.

        Raises:
            InvalidResponseError: Python cannot hold it here, so far down the stack.
        """
        if self._index is None:
            self._index = self._read(self._text())
        place, status, progress = self._index[task_id]
        return TaskSnapshot(task_id, status=status, progress=_percent(progress), body=(self, place))


PageIndex = dict[str, tuple[int, str, object]]
"""Where in an answer's ``data`` a task is, its status and its progress, by id."""
_ROOM: Final = 3 << 20


@frozen
class TaskSnapshot:
    """One look at a task. The answer's body is kept as bytes and parsed on access.

    Optional fields of an unexpected type read as None; `raw` has them as they came.

    Attributes:
        id: The task's id.
        status: The API's word: ``pending``, ``processing``, ``completed``, ``failed``,
            ``cancelled``, or one it has added since (which counts as running).
        progress: 0 to 100, None if the API did not say.
    """

    id: str
    status: str = field(kw_only=True)
    progress: int | None = field(default=None, kw_only=True)
    _text: bytes | str | dict[str, Any] | tuple[Page, int] = field(
        kw_only=True, repr=False, alias="body", eq=lambda text: _respelled(_cut_out(text))
    )

    @classmethod
    def from_json(
        cls,
        value: object,
        *,
        body: bytes | str | dict[str, Any] | None = None,
        status: str | None = None,
    ) -> TaskSnapshot:
        """Read a task object.

        Args:
            value: The parsed object.
            body: The text it was parsed from by `parse_json`, if that holds it alone; or
                *value* again, if nobody else holds that and `check_depth` was content.
            status: What to assume where the object has no usable status; without
                it such an object is refused.

        Raises:
            InvalidResponseError: *value* is not an object with a usable id and status.
        """
        if type(value) is not dict:
            raise _unusable(value, "a task is not a JSON object")
        task_id, word = value.get("id"), value.get("status")
        if type(task_id) is not str or not _is_task_id(task_id):
            raise _unusable(value, "the task has no usable id")
        if type(word) is not str or not word:
            if status is None:
                raise _unusable(value, f"task {task_id} has no status")
            word = status
        if body is None:
            check_depth(value)
            body = _dump(value)
        return cls(task_id, status=word, progress=_percent(value.get("progress")), body=body)

    def to_json(self) -> dict[str, Any]:
        """The task object as the API sent it."""
        return self.raw

    @property
    def body(self) -> bytes | str:
        """The task's JSON text."""
        return _cut_out(self._text)

    @property
    def raw(self) -> dict[str, Any]:
        """The task object as the API sent it, a new copy on each access."""
        text = self._text
        raw: dict[str, Any] = json.loads(_dump(text)) if isinstance(text, dict) else self._value
        return raw

    @property
    def _value(self) -> dict[str, Any]:
        """The task object, not to be changed."""
        text = self._text
        if isinstance(text, dict):
            return text
        value: dict[str, Any] = text[0].task(text[1]) if isinstance(text, tuple) else loads(text)
        return value

    @property
    def is_terminal(self) -> bool:
        """True once the task is completed, failed or cancelled."""
        return self.status in TERMINAL

    @property
    def model(self) -> str | None:
        """The model that really ran."""
        return _text(self._value.get("model"))

    @property
    def type(self) -> str | None:
        """Kind of output: ``text``, ``image``, ``audio`` or ``video``."""
        return _text(self._value.get("type"))

    @property
    def created(self) -> float | None:
        """When the task was made, in seconds since 1970."""
        return _number(self._value.get("created"))

    @property
    def estimated_time(self) -> float | None:
        """Seconds the API expects: all of the task at submit, the rest later (observed)."""
        return _number(_object(self._value.get("task_info")).get("estimated_time"))

    @property
    def duration(self) -> float | None:
        """Seconds the generation took (observed), once ended."""
        return _number(self._value.get("duration"))

    @property
    def usage(self) -> Usage:
        """What the task reserved and cost."""
        return Usage.from_json(self._value.get("usage"))

    @property
    def urls(self) -> tuple[str, ...]:
        """Result links, valid for 24 hours after completion; empty until then."""
        raw = self._value
        listed = raw.get("results")
        if isinstance(listed, list):
            links = tuple(x for x in listed if isinstance(x, str) and x)
            if links:
                return links
        return _links_of(raw.get("result_data"))

    @property
    def error_code(self) -> str | None:
        """The API's ``error.code`` of a failed task."""
        code = _object(self._value.get("error")).get("code")
        if isinstance(code, str) and code:
            return code
        return str(code) if isinstance(code, int) and not isinstance(code, bool) else None

    @property
    def error_message(self) -> str | None:
        """The API's ``error.message`` of a failed task."""
        return _text(_object(self._value.get("error")).get("message"))


def _percent(progress: object) -> int | None:
    """A progress of 0 to 100, None for anything else."""
    if type(progress) is not int:
        number = _number(progress)
        return round(number) if number is not None and 0 <= number <= 100 else None
    return progress if 0 <= progress <= 100 else None


def _cut_out(text: bytes | str | dict[str, Any] | tuple[Page, int]) -> bytes | str:
    """One task's own text."""
    if isinstance(text, tuple):
        text = text[0].task(text[1])
    return _dump(text) if isinstance(text, dict) else text


def _links_of(result_data: object) -> tuple[str, ...]:
    """Links from ``result_data`` (observed), for an answer without ``results``."""
    items = result_data if isinstance(result_data, list) else []
    names = ("image_url", "video_url", "audio_url", "url")
    found = (item.get(name) for item in items if isinstance(item, dict) for name in names)
    return tuple(link for link in found if isinstance(link, str) and link)


def _dump(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as exc:
        raise InvalidResponseError("the task cannot be kept as JSON") from exc


def _unusable(value: object, why: str) -> InvalidResponseError:
    return InvalidResponseError(f"{why}: {shown(value, 120)}", head=shown(value, 200))


@frozen
class GenerationResult:
    """A completed generation.

    Attributes:
        task_id: The task's id.
        urls: Links to the results, valid for 24 hours after completion.
        snapshot: The task as last read.
    """

    task_id: str
    urls: tuple[str, ...] = field(kw_only=True)
    snapshot: TaskSnapshot = field(kw_only=True, repr=False)

    @classmethod
    def from_snapshot(cls, snapshot: TaskSnapshot) -> Self:
        """The result of a completed task."""
        return cls(snapshot.id, urls=snapshot.urls, snapshot=snapshot)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read back what `to_json` gave.

        Raises:
            InvalidResponseError: *value* is not a task object.
        """
        return cls.from_snapshot(TaskSnapshot.from_json(value))

    def to_json(self) -> dict[str, Any]:
        """The completed task object as the API sent it."""
        return self.snapshot.to_json()

    @property
    def model(self) -> str | None:
        """The model that really ran."""
        return self.snapshot.model

    @property
    def usage(self) -> Usage:
        """What it cost."""
        return self.snapshot.usage

    @property
    def duration(self) -> float | None:
        """Seconds the generation took (observed)."""
        return self.snapshot.duration


@frozen
class TaskSummary:
    """One row of the account's task list (``GET /v1/tasks``, observed).

    Attributes:
        id: The task's id.
        status: The API's word for its state.
        model: Model name.
        type: Kind of output.
        progress: 0 to 100.
        created: Seconds since 1970.
        duration: Seconds it took.
        result_count: Number of results.
        credits_used: Credits charged.
        raw: The row as the API sent it.
    """

    id: str
    status: str = field(kw_only=True)
    model: str | None = field(default=None, kw_only=True)
    type: str | None = field(default=None, kw_only=True)
    progress: float | None = field(default=None, kw_only=True)
    created: float | None = field(default=None, kw_only=True)
    duration: float | None = field(default=None, kw_only=True)
    result_count: float | None = field(default=None, kw_only=True)
    credits_used: float | None = field(default=None, kw_only=True)
    raw: Mapping[str, Any] = field(kw_only=True, repr=False, hash=False)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read one row.

        Raises:
            InvalidResponseError: It has no usable id or status.
        """
        row = _object(value)
        task_id, status = row.get("id"), row.get("status")
        if not isinstance(task_id, str) or not _is_task_id(task_id):
            raise _unusable(value, "a row of the task list has no usable id")
        if not isinstance(status, str) or not status:
            raise _unusable(value, f"task {task_id} has no status in the task list")
        return cls(
            task_id,
            status=status,
            model=_text(row.get("model")),
            type=_text(row.get("type")),
            progress=_number(row.get("progress")),
            created=_number(row.get("created_at")),
            duration=_number(row.get("duration")),
            result_count=_number(row.get("result_count")),
            credits_used=_number(row.get("credits_used")),
            raw=row,
        )

    def to_json(self) -> dict[str, Any]:
        """The row as the API sent it."""
        return dict(self.raw)


@frozen(kw_only=True)
class Credits:
    """What is left to spend (``GET /v1/credits``), in credits.

    Attributes:
        remaining: Left on the account.
        used: Spent by the account.
        token_remaining: Left for this API key.
        token_used: Spent with this API key.
        token_unlimited: True if the key has no limit of its own.
    """

    remaining: float
    used: float | None = None
    token_remaining: float | None = None
    token_used: float | None = None
    token_unlimited: bool = False

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read the answer of the credits endpoint.

        Raises:
            InvalidResponseError: It does not say what is left.
        """
        data = _object(_object(value).get("data"))
        user, token = _object(data.get("user")), _object(data.get("token"))
        remaining = _number(user.get("remaining_credits"))
        if remaining is None:
            raise _unusable(value, "the answer does not say how many credits remain")
        return cls(
            remaining=remaining,
            used=_number(user.get("used_credits")),
            token_remaining=_number(token.get("remaining_credits")),
            token_used=_number(token.get("used_credits")),
            token_unlimited=token.get("unlimited_credits") is True,
        )

    def to_json(self) -> dict[str, Any]:
        """The answer in the API's shape."""
        user = {"remaining_credits": self.remaining, "used_credits": self.used}
        token = {
            "remaining_credits": self.token_remaining,
            "used_credits": self.token_used,
            "unlimited_credits": self.token_unlimited,
        }
        return {"data": {"user": user, "token": token}}


# ---------------------------------------------------------------------------------------------
# Settings and outcomes


def _positive_seconds(_: object, attribute: Any, value: object) -> None:
    seconds = _number(value)
    if seconds is None or seconds <= 0:
        raise ConfigurationError(
            f"{attribute.name}={value!r} is not allowed: seconds, a number above 0"
        )


@frozen(kw_only=True)
class Timeout:
    """How long one HTTP exchange may take, in seconds, counted from when it may start.

    Attributes:
        connect: Making a connection, TLS included. A submit that fails here was never sent.
        submit: A whole submit. Beyond it the outcome is unknown, so be generous.
        read: Anything else, and for a download the longest silence.
    """

    connect: float = field(default=10, validator=_positive_seconds)
    submit: float = field(default=60, validator=_positive_seconds)
    read: float = field(default=30, validator=_positive_seconds)
