"""How a batch is doing: counts, credits, rate, time left, and why it stopped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from attrs import define, field, frozen

from evolink_async.batch._budget import Money

__all__ = ["BatchCounts", "BatchProgress", "Progress", "Stop", "batch_counts"]

_ENDED: Final = frozenset({"saved", "failed", "uncertain"})
_RECENT: Final = 64
"""Items that ended last: the rate is theirs."""


@frozen(kw_only=True)
class Stop:
    """Why a batch stopped submitting before its end.

    Attributes:
        kind: ``interrupted``, ``authentication`` (401), ``credits`` (402), ``refused``
            (403 or 404 before anything was accepted), ``max_credits``,
            ``network``, ``disk`` or ``closed`` (the session was).
        message: The same in words, with what to do next.
    """

    kind: str
    message: str


@frozen(kw_only=True)
class BatchCounts:
    """Where the items of a batch are, those of earlier runs included, and what they cost.

    Attributes:
        total: All of them.
        queued: Not submitted yet.
        running: Submitted, or being submitted, and not seen to end.
        completed: Generated, not saved yet.
        saved: On disk.
        failed: Will not be made.
        uncertain: May have been accepted and paid for; see `SubmitUncertainError`.
        credits: Charged or reserved so far, over all runs; at the highest price seen where
            the API has not said how much.
        credits_uncertain: What uncertain items cost if they were accepted, at that price; not
            among *credits*. None if no price is known.
    """

    total: int
    queued: int = 0
    running: int = 0
    completed: int = 0
    saved: int = 0
    failed: int = 0
    uncertain: int = 0
    credits: float = 0.0
    credits_uncertain: float | None = 0.0


def batch_counts(states: Mapping[str, int], money: Money) -> dict[str, Any]:
    """The values of `BatchCounts`, of how many items are in which state."""
    same = ("queued", "completed", "saved", "failed", "uncertain")
    return {
        "total": sum(states.values()),
        "running": states.get("submitting", 0) + states.get("submitted", 0),
        **{state: states.get(state, 0) for state in same},
        "credits": money.credits,
        "credits_uncertain": money.credits_uncertain,
    }


@frozen(kw_only=True)
class BatchProgress(BatchCounts):
    """How a batch is doing; see `BatchCounts` for the other attributes.

    Attributes:
        rate: Items ended per second of late; None until that can be said.
        seconds_left: Until all have ended, at that rate; None if that cannot be said.
        stopping: Why no more are submitted; None while they are.
    """

    rate: float | None = None
    seconds_left: float | None = None
    stopping: str | None = None


@define(eq=False)
class Progress:
    """Counts the items in each state, and how fast they end."""

    states: dict[str, int]
    _ends: deque[float] = field(factory=lambda: deque(maxlen=_RECENT), init=False)

    def moved(self, before: str, after: str) -> None:
        """An item has gone from one state to another."""
        self.states[before] = self.states.get(before, 0) - 1
        self.states[after] = self.states.get(after, 0) + 1
        if after in _ENDED:
            self._ends.append(time.monotonic())

    def now(self, money: Money, stop: Stop | None) -> BatchProgress:
        """How the batch is doing."""
        counts = batch_counts(self.states, money)
        left = counts["running"] + counts["completed"] + counts["queued"]
        rate = self._rate()
        return BatchProgress(
            **counts,
            rate=rate,
            seconds_left=left / rate if rate else None,
            stopping=None if stop is None else stop.message,
        )

    def _rate(self) -> float | None:
        """Items ended per second, over the last of them."""
        if len(self._ends) < 8 or (span := time.monotonic() - self._ends[0]) <= 0:
            return None
        return (len(self._ends) - 1) / span
