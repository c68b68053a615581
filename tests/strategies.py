"""What arrives from outside, for property tests and for fuzzing.

``HYPOTHESIS_PROFILE`` chooses how long: ``ordinary`` (default; the same examples in every
run), ``thorough`` (twenty times as many, new ones each time).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from email.utils import format_datetime
from typing import Any

from attrs import frozen
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from evolink_async import (
    Credits,
    GenerationResult,
    ImageRequest,
    RawRequest,
    TaskSnapshot,
    TaskSummary,
    Usage,
)

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ordinary", derandomize=True, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile("thorough", deadline=None, suppress_health_check=_SLOW_IS_FINE)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ordinary")


def examples(count: int) -> settings:
    """Settings for *count* examples in the ordinary run."""
    times = 20 if PROFILE == "thorough" else 1
    return settings(settings.get_profile(PROFILE), max_examples=count * times)


@frozen
class Reader:
    """A ``from_json`` and the shape of its values."""

    name: str
    read: Callable[[Any], Any]


READERS = (
    Reader("Credits", Credits.from_json),
    Reader("GenerationResult", GenerationResult.from_json),
    Reader("ImageRequest", ImageRequest.from_json),
    Reader("RawRequest", RawRequest.from_json),
    Reader("TaskSnapshot", TaskSnapshot.from_json),
    Reader("TaskSummary", TaskSummary.from_json),
    Reader("Usage", Usage.from_json),
)


# -- JSON of any shape -------------------------------------------------------------------------

any_text = st.text(st.characters(), max_size=20) | st.text(
    st.characters(categories=["Cs", "Cc", "Cf"]), max_size=5
)
# Not spelled out: Python refuses to show an integer of 5000 digits, and so would a failure.
huge_ints = st.builds(
    lambda sign, power: sign * 10**power,
    st.sampled_from([1, -1]),
    st.sampled_from([20, 308, 309, 400, 4299, 5000]),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | huge_ints
    | st.floats()
    | any_text
    | st.sampled_from(
        ["", "pending", "completed", "1280x1280", "task-1", "\x1b[2J", "https://e.com"]
    )
)


_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2, 0.5, math.nan, math.inf, -math.inf, 1e308, 10**400, 10**5000),
    *("", " ", "x", "\x1b[2J", "\ud800", "\u202e", "a\nb", "0", "nan", "y" * 3000, "../..", "\0"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, ["\udfff"], [10**5000], {"code": []}),
)
odd = st.integers(0, len(_ODD) - 1).map(_ODD.__getitem__)  # cheaper to draw than `scalars`


def nested(depth: int, *, objects: bool, leaf: object = None) -> object:
    """Lists, or objects, *depth* deep."""
    value = leaf
    for _ in range(depth):
        value = {"": value} if objects else [value]
    return value


deep_values = st.builds(nested, st.integers(2, 3000), objects=st.booleans(), leaf=scalars)
_shallow_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=4,
)
json_values = _shallow_values | deep_values

# Half of the values are what the field should hold: pure noise never gets past the first check.
task_ids = st.sampled_from(["task-1", "task-unified-1757156493-imcg5zqt", "a:b._-", "x" * 128])
links = st.sampled_from(["https://r.example/a.png", "http://127.0.0.1/x", "file:///etc/passwd", ""])
_known: dict[str, st.SearchStrategy[Any]] = {
    "id": task_ids,
    "status": st.sampled_from(["pending", "processing", "completed", "failed", "cancelled", "new"]),
    "progress": st.integers(-1, 101) | st.floats(-1, 101),
    "model": st.sampled_from(["wan2.5-text-to-image", "m"]),
    "type": st.sampled_from(["image", "video"]),
    "created": st.integers(0, 2**33),
    "created_at": st.integers(0, 2**33),
    "duration": st.floats(),
    "task_info": st.fixed_dictionaries({"estimated_time": st.integers() | odd}),
    "usage": st.fixed_dictionaries({"credits_reserved": st.floats() | odd}),
    "results": st.lists(links | odd, max_size=3),
    "result_data": st.lists(
        st.fixed_dictionaries({}, optional={"image_url": links, "url": odd}),
        max_size=3,
    ),
    "error": st.fixed_dictionaries({}, optional={"code": odd, "message": odd, "type": odd}),
    "prompt": st.text(st.characters(categories=["L", "N", "Z"]), min_size=1, max_size=9),
    "size": st.sampled_from(["1280x1280", "768x768", "9x9", "00x1"]),
    "n": st.integers(-1, 5),
    "prompt_extend": st.booleans(),
    "callback_url": links,
    "extra": st.dictionaries(any_text, odd, max_size=2),
    "validate": st.booleans(),
    "path": st.sampled_from(["/v1/videos/generations", "//evil.example/x", "/v1/../x", "/"]),
    "body": st.dictionaries(any_text, odd, max_size=2),
    "data": st.fixed_dictionaries(
        {},
        optional={
            "user": st.fixed_dictionaries({"remaining_credits": st.floats() | odd}),
            "token": st.fixed_dictionaries({"unlimited_credits": odd}),
        },
    ),
}
_fields = {
    "Credits": ("data",),
    "ImageRequest": (
        *("model", "prompt", "size", "n", "prompt_extend", "callback_url", "extra", "validate"),
    ),
    "RawRequest": ("path", "body"),
    "TaskSummary": ("id", "status", "model", "type", "progress", "created_at", "duration"),
    "Usage": ("credits_reserved", "credits_used", "cost", "billing_rule", "user_group"),
}
_task = (
    "id",
    "status",
    "progress",
    "model",
    "task_info",
    "usage",
    "results",
    "result_data",
    "error",
)


def values_for(reader: str) -> st.SearchStrategy[Any]:
    """Anything, and objects that resemble what *reader* reads."""
    fields = {name: _known.get(name, odd) for name in _fields.get(reader, _task)}
    likely = st.fixed_dictionaries({}, optional={k: v | odd for k, v in fields.items()})
    right = st.fixed_dictionaries(fields)
    right_but_one = st.builds(
        lambda good, name, bad: {**good, name: bad}, right, st.sampled_from([*fields]), json_values
    )
    return json_values | likely | right | right_but_one


# -- HTTP answers ------------------------------------------------------------------------------

statuses = (
    st.sampled_from([200, 201, 204, 301, 304, 400, 401, 402, 403, 404, 408, 409, 413, 429])
    | st.sampled_from([500, 502, 503, 504, 520, 529])
    | st.integers(-1, 1000)
)
_dates = (
    st.datetimes().map(format_datetime)
    | st.sampled_from(
        [
            "Wed, 21 Oct 2015 07:28:00 GMT",
            "Wed, 21 Oct 2015 07:28:00 -0000",
            "Wed, 99 Oct 2015 07:28:00 GMT",
            "Mon, 01 Jan 0001 00:00:00 +9999",
            "21 Oct 99999 07:28:00 GMT",
        ]
    )
    | st.text(max_size=30)
)
_seconds = (
    st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["", " 7 ", "1e400", "0x10", "1_0", "٣", "9" * 5000])
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": _seconds | _dates,
        "Date": _dates,
        "X-Request-Id": any_text,
        "X-Oneapi-Request-Id": st.sampled_from(["req-1", "\x1b", ""]),
        "Idempotency-Replayed": st.sampled_from(["true", "TRUE", "false", "", "\0"]),
    },
)


def spelled(value: object, charset: str) -> bytes:
    """*value* as an answer's body in *charset*; its type where it cannot be said."""
    try:
        return json.dumps(value).encode(charset)
    except (ValueError, RecursionError):
        return f'["{type(value).__name__}"'.encode()


_error_objects = st.fixed_dictionaries(
    {
        "error": st.fixed_dictionaries(
            {},
            optional={
                "code": st.sampled_from([429, "insufficient_quota", "", None]) | odd,
                "message": odd,
                "type": odd,
                "param": odd,
                "fallback_suggestion": odd,
            },
        )
        | json_values
    }
)
_charsets = st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-32-le", "utf-8-sig"])
_spelled = st.builds(spelled, _error_objects | values_for("TaskSnapshot"), _charsets)
_cut = st.builds(lambda body, at: body[:at], _spelled, st.integers(0, 60))
_bombs = st.builds(
    lambda n, c: c * n, st.integers(1, 20_000), st.sampled_from([b"[", b'{"":', b"9"])
)
_pages = st.sampled_from(
    [b"", b"<html>502 Bad Gateway</html>", b"null", b"\xff\xfe", b'{"a":1,"a":2}']
)
bodies = st.binary(max_size=60) | _spelled | _cut | _bombs | _pages


# -- values ------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
costs = st.floats(0, 1e9)
_word = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_sayable = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | _word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_word, inner, max_size=3),
    max_leaves=4,
)
_json_objects = st.dictionaries(_word, _sayable, max_size=4)
_contract = ("model", "prompt", "size", "n", "prompt_extend", "callback_url")
_extras = _json_objects.map(lambda d: {k: v for k, v in d.items() if k not in _contract})

image_requests = st.builds(
    ImageRequest,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    size=st.none() | st.sampled_from(["768x768", "1280x1280", "1440x1440", "384x1536"]),
    n=st.none() | st.sampled_from([1, 2, 4]),
    prompt_extend=st.none() | st.booleans(),
    callback_url=st.none()
    | st.sampled_from(["https://example.com/done", "https://example.com:8443/"]),
    extra=_extras,
) | st.builds(
    ImageRequest,
    _word,
    model=_word,
    size=st.none() | _word,
    n=st.none() | st.integers(),
    extra=_extras,
    validate=st.just(value=False),
)
raw_requests = st.builds(
    RawRequest,
    st.lists(st.sampled_from(["v1", "videos", "a.b", "~x", "-", "_"]), min_size=1, max_size=4).map(
        lambda parts: "/" + "/".join(parts)
    ),
    body=_json_objects,
)
usages = st.builds(
    Usage,
    credits_reserved=st.none() | costs,
    credits_used=st.none() | costs,
    cost=st.none() | costs,
    billing_rule=st.none() | _word,
    user_group=st.none() | _word,
)
credit_answers = st.builds(
    Credits,
    remaining=finite,
    used=st.none() | finite,
    token_remaining=st.none() | finite,
    token_used=st.none() | finite,
    token_unlimited=st.booleans(),
)
_task_objects = st.builds(
    lambda more, known: {**more, **known},
    _json_objects,
    st.fixed_dictionaries(
        {"id": task_ids, "status": _word.filter(bool)},
        optional={"progress": st.integers(0, 100), "results": st.lists(links), "usage": _sayable},
    ),
)


def snapshot(value: dict[str, Any], indent: int | None, charset: str) -> TaskSnapshot:
    """A snapshot whose body has the server's own spacing and charset."""
    body = json.dumps(value, indent=indent).encode(charset)
    return TaskSnapshot.from_json(value, body=body)


snapshots = st.builds(TaskSnapshot.from_json, _task_objects) | st.builds(
    snapshot, _task_objects, st.none() | st.integers(0, 2), st.sampled_from(["utf-8", "utf-16"])
)
results = snapshots.map(GenerationResult.from_snapshot)
summaries = _task_objects.map(TaskSummary.from_json)
values: st.SearchStrategy[Any] = st.one_of(
    image_requests, raw_requests, usages, credit_answers, snapshots, results, summaries
)
