"""HTTP without I/O: what is sent where, and what an answer means.

One table (`_rule_for`) says, for every answer, which error it is, whether a read may be
tried again, and whether a submit was refused, may be sent again, or is uncertain.
Facts: the API's pages on errors and on each endpoint (https://docs.evolink.ai); what is
marked "observed" comes from the vendor's own open-source clients.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from email.utils import formatdate, parsedate_to_datetime
from enum import Enum
from typing import Any, Final

from attrs import frozen

from evolink_async import errors
from evolink_async._checks import refuse_field
from evolink_async._model.json import check_depth, parse_items, parse_json
from evolink_async._model.snapshots import TaskSnapshot
from evolink_async._text import printable
from evolink_async.errors import (
    APIStatusError,
    InvalidResponseError,
)

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
    "is_quota",
    "is_replayed",
    "new_idempotency_key",
    "read_task",
    "read_tasks",
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


_encoder: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


# ---------------------------------------------------------------------------------------------
# The table


class Submit(Enum):
    """What an answer means for the submit it answers."""

    REFUSED = "not accepted, and would be refused again"
    RESEND = "surely not accepted: the same submit may be sent again"
    UNCERTAIN = "may have been accepted, and paid for"


@frozen
class Rule:
    """One row of the table.

    Attributes:
        error: The error to raise.
        read: Whether a read may be tried again.
        submit: What it means for a submit.
        throttle: Whether it asks the whole session to wait.
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


def _rule_for(status: int, *, from_api: bool, quota: bool) -> Rule:
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


def decipher(status: int, headers: Mapping[str, str], body: bytes) -> Any:
    """The JSON value of a successful answer.

    Args:
        status: HTTP status code.
        headers: The response headers, looked up by the names in `ANSWER_HEADERS`.
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
                f"HTTP {status}, but {exc}", status=status, head=exc.head, request_id=_id(headers)
            ) from exc
    raise _status_error(status, headers, body)


def read_task(body: bytes, task_id: str) -> TaskSnapshot:
    """The task of a single read's answer.

    Raises:
        InvalidResponseError: It is not that task.
    """
    snapshot = TaskSnapshot.from_json(parse_json(body), body=body)
    if snapshot.id != task_id:
        raise InvalidResponseError(f"asked for task {task_id}, got {snapshot.id}")
    return snapshot


def read_tasks(
    body: bytes, ids: tuple[str, ...]
) -> dict[str, TaskSnapshot | InvalidResponseError | None]:
    """What a batch read's answer says of each of *ids*: None for one that it left out.

    Order, duplicates (the first counts) and other tasks do no harm; a broken task is an error
    of its own.

    Raises:
        InvalidResponseError: There is no list of tasks named ``data``.
    """
    asked = dict(zip(ids, ids, strict=True))
    answers: dict[str, TaskSnapshot | InvalidResponseError | None] = dict.fromkeys(ids)
    for task, text in parse_items(body, "data"):
        found = task.get("id") if type(task) is dict else None
        task_id = asked.get(found) if type(found) is str else None
        if task_id is not None and answers[task_id] is None:
            try:
                if text is not None:
                    check_depth(task, text)
                answers[task_id] = TaskSnapshot.from_json(task, body=text, known_id=task_id)
            except InvalidResponseError as exc:
                answers[task_id] = exc
    return answers


def _status_error(status: int, headers: Mapping[str, str], body: bytes) -> APIStatusError:
    error = _error_object(body)
    code = _word(error.get("code"))
    message = _word(error.get("message"), 500)
    suggestion = _word(error.get("fallback_suggestion")) or _word(error.get("suggestion"))
    kind = _word(error.get("type"))
    rule = _rule_for(status, from_api=bool(error), quota=is_quota(code, kind))
    return rule.error(
        _sentence(status, code, message, suggestion, body),
        status=status,
        code=code,
        type=kind,
        param=_word(error.get("param")),
        suggestion=suggestion,
        request_id=_id(headers),
        retry_after=_retry_after(headers),
        from_api=bool(error),
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
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict) and (_word(error.get("code")) or _word(error.get("message"))):
        return error
    return {}


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
        found = (_seconds_until(given, date) for date in dates)
        seconds = next(filter(math.isfinite, found), math.nan)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until(given: str, now: str) -> float:
    try:
        return (parsedate_to_datetime(given) - parsedate_to_datetime(now)).total_seconds()
    except (TypeError, ValueError, IndexError, OverflowError):
        return math.nan
