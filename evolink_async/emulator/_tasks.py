"""One task: its timeline, and what the API says about it at a time. There are no timers."""

from __future__ import annotations

import math
from typing import Any

from attrs import define, frozen

from evolink_async.emulator._contract import Submission

__all__ = ["RESULT_LIFETIME", "GenerationTask", "Timeline", "exact"]

RESULT_LIFETIME = 24 * 3600.0
"""Seconds a result link works after the task has completed (docs.evolink.ai, "query task")."""

_SUFFIXES = {"image": "png", "audio": "wav", "video": "mp4"}


def exact(amount: float) -> float:
    """Credits, rounded to six decimals; whole ones as an integer."""
    rounded = round(amount, 6)
    return int(rounded) if rounded == int(rounded) else rounded


@frozen(kw_only=True)
class Timeline:
    """When a task changes, and how it ends; decided when it is accepted.

    Attributes:
        starts_at: When it turns from pending to processing.
        ends_at: When it reaches *status*; infinite for one that hangs.
        status: How it ends: ``completed``, ``failed``, ``cancelled``.
        made: Results it will have; the task is charged for these.
        error_code: Of a failed or cancelled task.
        error_message: Of a failed or cancelled task.
        stuck_at: Progress it never gets beyond, in percent.
        vanishes_at: When the API forgets it.
        lag: Seconds after its acceptance until the API knows it.
        word: A status word shown instead of ``processing``.
        falls_back: Whether progress goes back in the second half.
    """

    starts_at: float
    ends_at: float
    status: str = "completed"
    made: int
    error_code: str | None = None
    error_message: str | None = None
    stuck_at: int = 99
    vanishes_at: float = math.inf
    lag: float = 0.0
    word: str | None = None
    falls_back: bool = False

    def status_at(self, now: float) -> str:
        """The status word at *now*."""
        if now >= self.ends_at:
            return self.status
        if now < self.starts_at:
            return "pending"
        return self.word or "processing"

    def progress_at(self, now: float) -> int:
        """Percent done at *now*: linear in time, 100 only once completed."""
        if now >= self.ends_at and self.status == "completed":
            return 100
        passed = min(now, self.ends_at) - self.starts_at
        if passed <= 0:
            return 0
        lasts = self.ends_at - self.starts_at
        share = 1.0 if math.isinf(lasts) else passed / lasts
        if self.falls_back and share > 0.5:
            share = 1 - share
        return min(self.stuck_at, int(100 * share))


@define(kw_only=True, eq=False)
class GenerationTask:
    """One accepted submit."""

    id: str
    submission: Submission
    accepted_at: float
    estimate: float
    timeline: Timeline
    reserved: float
    secret: str
    price: float
    charged: float | None = None
    reads: int = 0
    delivered: int = 0
    idempotency_key: str | None = None

    def ended(self, now: float) -> bool:
        """Whether it has ended by *now*."""
        return now >= self.timeline.ends_at

    def credits_used(self) -> float:
        """What it is charged when it ends."""
        completed = self.timeline.status == "completed"
        return exact(self.price * self.timeline.made) if completed else 0

    def known_at(self, now: float) -> bool:
        """Whether a read at *now* finds it."""
        return self.accepted_at + self.timeline.lag <= now < self.timeline.vanishes_at

    def result_paths(self) -> tuple[str, ...]:
        """The paths of its results on the emulator's own origin."""
        suffix = _SUFFIXES[self.submission.type]
        return tuple(
            f"/results/{self.secret}/{self.id}-{number}.{suffix}"
            for number in range(1, self.timeline.made + 1)
        )

    def answer(self, now: float, base_url: str, without: frozenset[str]) -> dict[str, Any]:
        """The body of a read at *now*; *without* names undocumented features to leave out."""
        status = self.timeline.status_at(now)
        ended = self.ended(now)
        passed = 0.0 if "remaining_time" in without else now - self.accepted_at
        left = 0.0 if ended else max(0.0, self.estimate - passed)
        answer: dict[str, Any] = {
            "created": int(self.accepted_at),
            "id": self.id,
            "model": self.submission.model,
            "object": f"{self.submission.type}.generation.task",
            "progress": self.timeline.progress_at(now),
            "status": status,
            "task_info": {"can_cancel": not ended, "estimated_time": round(left)},
            "type": self.submission.type,
            "usage": {
                "billing_rule": "per_call",
                "credits_reserved": self.reserved,
                "user_group": "default",
            },
        }
        if ended:
            self._add_end(answer, base_url, without)
        return answer

    def _add_end(self, answer: dict[str, Any], base_url: str, without: frozenset[str]) -> None:
        timeline = self.timeline
        if timeline.status == "completed":
            urls = [base_url + path for path in self.result_paths()]
            answer["results"] = urls
            if "result_data" not in without:
                name = f"{self.submission.type}_url"
                answer["result_data"] = [{name: url} for url in urls]
        else:
            answer["error"] = {"code": timeline.error_code, "message": timeline.error_message}
            if "error_details" not in without:
                answer["error"] |= {"type": "task_error", "suggestion": "see the error code's page"}
        if "duration" not in without:
            answer["duration"] = round(timeline.ends_at - self.accepted_at, 3)
        if "credits_used" not in without:
            answer["usage"]["credits_used"] = answer["usage"]["cost"] = self.credits_used()

    def summary(self, now: float) -> dict[str, Any]:
        """Its entry in the list of tasks at *now* (observed, not documented)."""
        timeline = self.timeline
        ended = self.ended(now)
        completed = ended and timeline.status == "completed"
        return {
            "id": self.id,
            "model": self.submission.model,
            "type": self.submission.type,
            "status": timeline.status_at(now),
            "progress": timeline.progress_at(now),
            "created_at": int(self.accepted_at),
            "duration": round(timeline.ends_at - self.accepted_at, 3) if ended else 0,
            "has_results": completed,
            "result_count": timeline.made if completed else 0,
            "has_error": ended and timeline.error_code is not None,
            "credits_used": self.credits_used() if ended else 0,
        }
