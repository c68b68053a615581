"""HTTP without I/O: what is sent where, and what an answer means.

One table (`rule_for`) says, for every answer, which error it is, whether a read may be
tried again, and whether a submit was refused, may be sent again, or is uncertain.
Facts: the API's pages on errors and on each endpoint (https://docs.evolink.ai); what is
marked "observed" comes from the vendor's own open-source clients.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.utils import formatdate, parsedate_to_datetime
from enum import Enum
from typing import Any, Final

from attrs import frozen

from evolink_async import errors
from evolink_async._checks import refuse_field
from evolink_async._model.json import check_depth, load_json, parse_json
from evolink_async._model.snapshots import RUNNING, Page, PageIndex, TaskSnapshot
from evolink_async._text import printable
from evolink_async.errors import (
    APIStatusError,
    EvolinkError,
    InvalidResponseError,
)

try:
    from evolink_async._model import skim as _skim
except ImportError:  # without msgspec every answer is parsed whole
    _skim = None  # type: ignore[assignment]  # so it is told apart

__all__ = [
    "ANSWER_HEADERS",
    "BATCH_LIMIT",
    "BATCH_PATH",
    "CREDITS_PATH",
    "TASKS_PATH",
    "Submit",
    "check_idempotency_key",
    "decipher",
    "encode",
    "encode_ids",
    "is_quota",
    "is_replayed",
    "new_idempotency_key",
    "read_task",
    "read_tasks",
    "rule_for",
    "task_path",
]

TASKS_PATH: Final = "/v1/tasks"
BATCH_PATH: Final = "/v1/tasks/batch"
BATCH_LIMIT: Final = 50
"""Ids one batch read may ask for (observed)."""
CREDITS_PATH: Final = "/v1/credits"

ANSWER_HEADERS: Final = (
    "Date",
    "Idempotency-Replayed",
    "Retry-After",
    "X-Oneapi-Request-Id",
    "X-Request-Id",
)
"""The response headers an answer's meaning depends on."""

_KEY: Final = re.compile(r"[A-Za-z0-9._-]{16,96}")


def is_replayed(headers: Mapping[str, str]) -> bool:
    """Whether an answer is the stored one of an earlier request with the same key (observed)."""
    return headers.get("Idempotency-Replayed", "").lower() == "true"


def task_path(task_id: str) -> str:
    """Where a task is read. Ids hold no character that a path would need quoted."""
    return f"{TASKS_PATH}/{task_id}"


def new_idempotency_key() -> str:
    """A fresh key: 32 hexadecimal digits (16-96 of ``A-Za-z0-9._-`` are taken, observed)."""
    return secrets.token_hex(16)


def check_idempotency_key(key: object) -> str:
    """*key* itself, if the gateway would take it.

    Raises:
        RequestValidationError: It would not.
    """
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key
    allowed = "16 to 96 characters of A-Z a-z 0-9 . _ -"
    raise refuse_field("idempotency_key", key, allowed)


def encode(value: Mapping[str, Any]) -> bytes:
    """A JSON body."""
    return _encoder.encode(value).encode()


def encode_ids(ids: Sequence[str]) -> bytes:
    """The body of a batch read. Ids hold no character that JSON would escape."""
    return b'{"task_ids":["%b"]}' % '","'.join(ids).encode()


_encoder: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


# ---------------------------------------------------------------------------------------------
# The table


class Submit(Enum):
    """What an answer says of the submit it answers."""

    REFUSED = "not accepted, and would be refused again"
    RESEND = "surely not accepted: the same submit may be sent again"
    UNCERTAIN = "may have been accepted, and paid for"


@frozen
class Rule:
    """One row: the error, whether a read may be tried again, what became of a submit.

    And whether it asks the whole session to wait.
    """

    error: type[APIStatusError]
    read: bool
    submit: Submit
    throttle: bool = False


_REFUSED, _RESEND, _UNCERTAIN = Submit.REFUSED, Submit.RESEND, Submit.UNCERTAIN

# The API's own JSON error object, by status.
_FROM_API: Final = {
    400: Rule(errors.InvalidRequestError, False, _REFUSED),
    401: Rule(errors.AuthenticationError, False, _REFUSED),
    402: Rule(errors.InsufficientCreditsError, False, _REFUSED),
    403: Rule(errors.PermissionDeniedError, False, _REFUSED),
    404: Rule(errors.NotFoundError, False, _REFUSED),
    408: Rule(errors.ServerError, True, _UNCERTAIN),
    413: Rule(errors.RequestTooLargeError, False, _REFUSED),
    429: Rule(errors.RateLimitError, True, _RESEND, throttle=True),
    503: Rule(errors.ServerError, True, _RESEND, throttle=True),
}
# Anything else under that status: a proxy's page says nothing about the account or the task,
# and a 503 or 429 of unknown origin is no promise that the API did not see the submit.
_FROM_ELSEWHERE: Final = _FROM_API | {
    401: Rule(errors.AuthenticationError, True, _REFUSED),
    403: Rule(errors.PermissionDeniedError, True, _REFUSED),
    404: Rule(errors.NotFoundError, True, _REFUSED),
    429: Rule(errors.RateLimitError, True, _REFUSED, throttle=True),
    503: Rule(errors.ServerError, True, _UNCERTAIN, throttle=True),
}
_QUOTA: Final = Rule(errors.InsufficientCreditsError, False, _REFUSED)
_REDIRECT: Final = Rule(errors.APIStatusError, False, _UNCERTAIN)
_OTHER_4XX: Final = Rule(errors.InvalidRequestError, False, _REFUSED)
_OTHER: Final = Rule(errors.ServerError, True, _UNCERTAIN)


def rule_for(status: int, *, from_api: bool, quota: bool) -> Rule:
    """The row of the table for an answer that is not a success."""
    if status == 429 and quota:
        return _QUOTA
    table = _FROM_API if from_api else _FROM_ELSEWHERE
    if status in table:
        return table[status]
    if 300 <= status < 400:
        return _REDIRECT
    return _OTHER_4XX if 400 <= status < 500 else _OTHER


def is_quota(*words: str | None) -> bool:
    """True if a code or type means "nothing left to spend" rather than "too fast"."""
    return any("quota" in word for word in words if word is not None)


# ---------------------------------------------------------------------------------------------
# Answers


def decipher(status: int, headers: Callable[[], Mapping[str, str]], body: bytes) -> Any:
    """The JSON value of a successful answer.

    Args:
        status: HTTP status code.
        headers: Gives the response headers, looked up as ``Retry-After``, ``Date``,
            ``X-Request-Id``; called only if the answer is no good.
        body: The decompressed body.

    Raises:
        APIStatusError: The answer is an error; the subclass says which.
        InvalidResponseError: It claims success but its body is not JSON.
    """
    if 200 <= status < 300:
        try:
            return parse_json(body)
        except InvalidResponseError as exc:
            raise InvalidResponseError(
                f"HTTP {status}, but {exc}", status=status, head=exc.head, request_id=_id(headers())
            ) from exc
    raise _status_error(status, headers(), body)


def read_task(body: bytes, task_id: str) -> TaskSnapshot:
    """The task of a single read's answer.

    Raises:
        InvalidResponseError: It is not that task.
    """
    snapshot = TaskSnapshot.from_json(parse_json(body), body=body)
    if snapshot.id != task_id:
        raise InvalidResponseError(f"asked for task {task_id}, got {snapshot.id}")
    return snapshot


_LONG_TASK: Final = 4096
"""Bytes per task of a batch answer from which each task keeps a text of its own."""


def read_tasks(
    body: bytes, ids: tuple[str, ...]
) -> tuple[Page | None, dict[str, TaskSnapshot | EvolinkError | None]]:
    """What a batch read's answer says of the tasks *ids*.

    Order, duplicates (the first counts) and tasks nobody asked for do no harm.

    Returns:
        The page of the tasks that are pending or processing, which most are; and everything
        else by id: a task, the error of a broken one, None for an id that was left out.

    Raises:
        InvalidResponseError: There is no list of tasks named ``data``.
    """
    if len(body) > _LONG_TASK * len(ids):  # too much to be kept for the sake of one of them
        data = _data_of(body)
        places = _places(list(map(_id_of, data)), ids)
        tasks = [None if place is None else data[place] for place in places]
        return None, dict(zip(ids, map(_read_one, tasks), strict=True))
    return (_skimmed(body, ids) if _skim is not None else None) or _parsed(body, ids)


def _skimmed(
    body: bytes, ids: tuple[str, ...]
) -> tuple[Page, dict[str, TaskSnapshot | EvolinkError | None]] | None:
    """The same from a regular answer, of which only ended tasks are parsed; None from others."""
    rows = _skim.rows(body)
    if rows is None:
        return None
    places = _places([row.id for row in rows], ids)
    odd = _odd(ids, places, [row.status for row in rows])
    texts = _skim.texts(body) if odd else []
    others = {
        task_id: None if place is None else _read_text(bytes(texts[place]))
        for task_id, place in odd
    }
    return Page(body, _skimmed_index, _skimmed_task), others


def _skimmed_index(body: bytes) -> PageIndex:
    rows = _skim.rows(body)
    if rows is None:  # the stack is deeper now than when it was read
        return _parsed_index(body)
    return _index((row.id, row.status, row.progress) for row in rows)


def _skimmed_task(body: bytes, place: int) -> Any:
    return load_json(bytes(_skim.texts(body)[place]))


def _parsed(
    body: bytes, ids: tuple[str, ...]
) -> tuple[Page, dict[str, TaskSnapshot | EvolinkError | None]]:
    """The same from any answer, parsed whole."""
    data = _data_of(body)
    places = _places(list(map(_id_of, data)), ids)
    odd = _odd(ids, places, list(map(_status_of, data)))
    others = {task_id: None if place is None else _read_one(data[place]) for task_id, place in odd}
    return Page(body, _parsed_index), others


def _parsed_index(body: bytes) -> PageIndex:
    data = _data_of(body)
    return _index(
        (_id_of(task), _status_of(task), task.get("progress") if type(task) is dict else None)
        for task in data
    )


def _index(tasks: Iterable[tuple[object, object, object]]) -> PageIndex:
    """Where the tasks of an answer are that go on; of duplicates the first."""
    index: PageIndex = {}
    for place, (task_id, status, progress) in enumerate(tasks):
        if type(task_id) is str and type(status) is str:
            index.setdefault(task_id, (place, status, progress))
    return index


def _odd(
    ids: tuple[str, ...], places: Sequence[int | None], words: list[str | None]
) -> list[tuple[str, int | None]]:
    """Those of *ids*, and where they are, that do not go on, by the status at each place."""
    if type(places) is range:  # nearly always
        return [(ids[place], place) for place, word in enumerate(words) if word not in RUNNING]
    return [
        (task_id, place)
        for task_id, place in zip(ids, places, strict=True)
        if place is None or words[place] not in RUNNING
    ]


def _data_of(body: bytes) -> list[Any]:
    value = load_json(body)
    data = value.get("data") if type(value) is dict else None
    if type(data) is not list:
        raise InvalidResponseError("the batch answer has no list named data")
    return data


def _id_of(task: object) -> object:
    return task.get("id") if type(task) is dict else None


def _status_of(task: object) -> str | None:
    word = task.get("status") if type(task) is dict else None
    return word if type(word) is str else None


def _places(found: list[Any], ids: tuple[str, ...]) -> Sequence[int | None]:
    """Where in *found* each id is; None for one that is not there."""
    if tuple(found) == ids:
        return range(len(ids))
    where: dict[str, int] = {}
    for place, task_id in enumerate(found):
        if type(task_id) is str:
            where.setdefault(task_id, place)
    return [where.get(task_id) for task_id in ids]


def _read_one(task: Any) -> TaskSnapshot | EvolinkError | None:
    try:
        check_depth(task)
        return None if task is None else TaskSnapshot.from_json(task, body=task)
    except InvalidResponseError as exc:
        return exc


def _read_text(text: bytes) -> TaskSnapshot | EvolinkError:
    try:
        task = parse_json(text)
        return TaskSnapshot.from_json(task, body=task)
    except InvalidResponseError as exc:
        return exc


def _status_error(status: int, headers: Mapping[str, str], body: bytes) -> APIStatusError:
    told = _error_object(body)
    code = _word(told.get("code"))
    message = _word(told.get("message"), 500)
    suggestion = _word(told.get("fallback_suggestion")) or _word(told.get("suggestion"))
    kind = _word(told.get("type"))
    rule = rule_for(status, from_api=bool(told), quota=is_quota(code, kind))
    return rule.error(
        _sentence(status, code, message, suggestion, body),
        status=status,
        code=code,
        type=kind,
        param=_word(told.get("param")),
        suggestion=suggestion,
        request_id=_id(headers),
        retry_after=_retry_after(headers),
        from_api=bool(told),
        replayed=is_replayed(headers),
        retryable=rule.read,
        resendable=rule.submit is Submit.RESEND,
        may_have_been_accepted=rule.submit is Submit.UNCERTAIN,
        is_throttle=rule.throttle,
    )


def _error_object(body: bytes) -> Mapping[str, Any]:
    """The API's ``error`` object, empty if the body is something else."""
    try:
        value = parse_json(body)
    except InvalidResponseError:
        return {}
    told = value.get("error") if isinstance(value, dict) else None
    if not isinstance(told, dict):
        return {}
    return told if _word(told.get("code")) or _word(told.get("message")) else {}


def _word(value: object, limit: int = 200) -> str | None:
    """A field that may be a string or, in older answers, a number."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return printable(str(value), limit)


_ADVICE: Final = {
    401: "check the API key (EVOLINK_API_KEY)",
    402: "top up the account",
    403: "this key may not do that; see the key's permissions",
}


def _sentence(
    status: int, code: str | None, message: str | None, suggestion: str | None, body: bytes
) -> str:
    if message is None:
        head = printable(body[:200].decode("utf-8", "replace"), 80).strip()
        message = f"not the API's own answer: {head}" if head else "empty answer"
    named = f" ({code})" if code and code != str(status) else ""
    advice = suggestion or _ADVICE.get(status)
    return f"HTTP {status}{named}: {message}" + (f"; {advice}" if advice else "")


def _id(headers: Mapping[str, str]) -> str | None:
    given = headers.get("X-Request-Id") or headers.get("X-Oneapi-Request-Id")
    return printable(given, 128) if given else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: a number, or a date read against the answer's own Date, else our clock."""
    given = headers.get("Retry-After", "").strip()
    try:
        seconds = float(given)
    except ValueError:
        dates = (headers.get("Date", ""), formatdate(usegmt=True))
        told = (_seconds_until(given, date) for date in dates)
        seconds = next(filter(math.isfinite, told), math.nan)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until(given: str, now: str) -> float:
    try:
        return (parsedate_to_datetime(given) - parsedate_to_datetime(now)).total_seconds()
    except (TypeError, ValueError, IndexError, OverflowError):
        return math.nan
