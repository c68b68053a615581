"""What the API says about tasks: snapshots, results, list rows, credits. Values without I/O.

Wire facts are those of the API's page for ``wan2.5-text-to-image``
(https://docs.evolink.ai, image series) unless a docstring says "observed".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, Self

from attrs import asdict, field, frozen

from evolink_async._model.json import check_depth, dump, loads, unusable
from evolink_async._model.requests import is_task_id

__all__ = [
    "RESUBMITTABLE",
    "RUNNING",
    "TERMINAL",
    "Credits",
    "GenerationResult",
    "TaskSnapshot",
    "TaskSummary",
    "Usage",
]


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
    """A number that can be the cost of a task, None for anything else."""
    number = _number(value)
    return number if number is not None and 0 <= number <= 1e9 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@frozen(kw_only=True)
class Usage:
    """What a task reserved and cost, in credits; None where the API did not say.

    A negative number, or one above 1e9, is a mistake of the API and reads as None.

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
        """Read a usage object; a field of an unexpected type reads as None."""
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
        return asdict(self, filter=lambda _, value: value is not None)


def _respelled(body: bytes | str) -> str:
    """A body without its accidents of white space and encoding, to compare by."""
    return json.dumps(json.loads(body))


@frozen
class TaskSnapshot:
    """A task as one poll found it. The answer's body is kept as bytes and parsed on access.

    Optional fields of an unexpected type read as None; `raw` has them as they came.

    Attributes:
        id: The task's id.
        status: The API's word for its state: ``pending``, ``processing``, ``completed``,
            ``failed``, ``cancelled``, or one it has added since (which counts as running).
        progress: 0 to 100, None if the API did not say.
        body: The task's JSON text.
    """

    id: str
    status: str = field(kw_only=True)
    progress: int | None = field(default=None, kw_only=True)
    body: bytes | str = field(kw_only=True, repr=False, eq=_respelled)

    @classmethod
    def from_json(
        cls,
        value: object,
        *,
        body: bytes | str | None = None,
        status: str | None = None,
        known_id: str | None = None,
    ) -> TaskSnapshot:
        """Read a task object.

        Args:
            value: The parsed object.
            body: The text it was parsed from, if that holds it alone and was checked
                for its depth.
            status: Assumed if the object has no usable status; without it such an object is
                refused.
            known_id: The id it is known to have, kept instead of another copy of it.

        Raises:
            InvalidResponseError: *value* is not an object with a usable id and status.
        """
        if type(value) is not dict:
            raise unusable(value, "a task is not a JSON object")
        task_id, word = known_id, value.get("status")
        if task_id is None:
            task_id = value.get("id")
            if type(task_id) is not str or not is_task_id(task_id):
                raise unusable(value, "the task has no usable id")
        if type(word) is not str or not word:
            if status is None:
                raise unusable(value, f"task {task_id} has no status")
            word = status
        if body is None:
            check_depth(value)
            body = dump(value)
        return cls(task_id, status=word, progress=_percent(value.get("progress")), body=body)

    def to_json(self) -> dict[str, Any]:
        """The task object as the API sent it."""
        return self.raw

    @property
    def raw(self) -> dict[str, Any]:
        """The task object as the API sent it, a new copy on each access."""
        value: dict[str, Any] = loads(self.body)
        return value

    @property
    def is_terminal(self) -> bool:
        """True once the task is completed, failed or cancelled."""
        return self.status in TERMINAL

    @property
    def model(self) -> str | None:
        """The model that really ran."""
        return _text(self.raw.get("model"))

    @property
    def type(self) -> str | None:
        """Kind of output: ``text``, ``image``, ``audio`` or ``video``."""
        return _text(self.raw.get("type"))

    @property
    def created(self) -> float | None:
        """When the task was made, in seconds since 1970."""
        return _number(self.raw.get("created"))

    @property
    def estimated_time(self) -> float | None:
        """Seconds the API expects: all of the task at submit, the rest later (observed)."""
        return _number(_object(self.raw.get("task_info")).get("estimated_time"))

    @property
    def duration(self) -> float | None:
        """Seconds the generation took (observed), once ended."""
        return _number(self.raw.get("duration"))

    @property
    def usage(self) -> Usage:
        """What the task reserved and cost."""
        return Usage.from_json(self.raw.get("usage"))

    @property
    def urls(self) -> tuple[str, ...]:
        """Result links, valid for 24 hours after completion; empty until then."""
        raw = self.raw
        listed = raw.get("results")
        if isinstance(listed, list):
            links = tuple(x for x in listed if isinstance(x, str) and x)
            if links:
                return links
        return _links_of(raw.get("result_data"))

    @property
    def error_code(self) -> str | None:
        """The API's ``error.code`` of a failed task."""
        code = _object(self.raw.get("error")).get("code")
        if isinstance(code, str) and code:
            return code
        return str(code) if isinstance(code, int) and not isinstance(code, bool) else None

    @property
    def error_message(self) -> str | None:
        """The API's ``error.message`` of a failed task."""
        return _text(_object(self.raw.get("error")).get("message"))


def _percent(progress: object) -> int | None:
    """A progress of 0 to 100, None for anything else."""
    if type(progress) is not int:
        number = _number(progress)
        return round(number) if number is not None and 0 <= number <= 100 else None
    return progress if 0 <= progress <= 100 else None


def _links_of(result_data: object) -> tuple[str, ...]:
    """Links from ``result_data`` (observed), for an answer without ``results``."""
    items = result_data if isinstance(result_data, list) else []
    names = ("image_url", "video_url", "audio_url", "url")
    found = (item.get(name) for item in items if isinstance(item, dict) for name in names)
    return tuple(link for link in found if isinstance(link, str) and link)


@frozen
class GenerationResult:
    """A completed generation.

    Attributes:
        task_id: The task's id.
        urls: Links to the results, valid for 24 hours after completion.
        snapshot: The task as last polled.
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
        if not isinstance(task_id, str) or not is_task_id(task_id):
            raise unusable(value, "a row of the task list has no usable id")
        if not isinstance(status, str) or not status:
            raise unusable(value, f"task {task_id} has no status in the task list")
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
            raise unusable(value, "the answer does not say how many credits remain")
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
