"""How a batch is doing: counts, credits, rate and time left."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from evolink_async.batch._budget import Money

__all__ = ["BatchProgress", "Progress"]

REPORT_EVERY: Final = 1.0
"""Real seconds between two reports while nothing changes."""
_ENDED: Final = frozenset({"saved", "failed", "uncertain"})
_RECENT: Final = 64
"""Items that ended last: the rate is theirs."""


@frozen(kw_only=True)
class BatchProgress:
    """How a batch is doing. All counts are items, those of earlier runs included.

    Attributes:
        total: All of them.
        queued: Not submitted yet.
        running: Submitted, or being submitted.
        completed: Generated, not yet saved.
        saved: On disk.
        failed: Will not be made.
        uncertain: May have been paid for; see `SubmitUncertainError`.
        credits: Charged or reserved so far, over all runs; at the highest price seen where
            the API has not said how much.
        credits_uncertain: What uncertain items cost if they were accepted, at that price; not
            among *credits*. None if no price is known.
        rate: Items ended per second of late; None until that can be said.
        seconds_left: Until all have ended, at that rate; None if that cannot be said.
        stopping: Why no more are submitted; None while they are.
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
    rate: float | None = None
    seconds_left: float | None = None
    stopping: str | None = None


@define(eq=False, kw_only=True)
class Progress:
    """Counts the items in each state, and reports each change.

    Attributes:
        states: Items by state.
        money: What they cost.
        callback: Called with each `BatchProgress`, if there is one.
        stopping: Why no more are submitted; None while they are.
        error: What *callback* has raised.
    """

    states: dict[str, int]
    money: Money
    callback: Callable[[BatchProgress], None] | None
    stopping: str | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    _ends: deque[float] = field(factory=lambda: deque(maxlen=_RECENT), init=False)

    def moved(self, before: str, after: str) -> None:
        """An item has gone from one state to another."""
        self.states[before] = self.states.get(before, 0) - 1
        self.states[after] = self.states.get(after, 0) + 1
        if after in _ENDED:
            self._ends.append(time.monotonic())
        self.report()

    def report(self) -> None:
        """Call the callback; what it raises is raised here, and kept."""
        if self.callback is None:
            return
        try:
            self.callback(self._now())
        except Exception as exc:
            self.error = self.error or exc
            raise

    async def keep_reporting(self) -> None:
        """Rate and time left change while nothing else does."""
        while self.callback is not None:
            await asyncio.sleep(REPORT_EVERY)
            self.report()

    def _now(self) -> BatchProgress:
        states = self.states
        running = states.get("submitting", 0) + states.get("submitted", 0)
        left = running + states.get("completed", 0) + states.get("queued", 0)
        rate = self._rate()
        return BatchProgress(
            total=sum(states.values()),
            queued=states.get("queued", 0),
            running=running,
            completed=states.get("completed", 0),
            saved=states.get("saved", 0),
            failed=states.get("failed", 0),
            uncertain=states.get("uncertain", 0),
            credits=self.money.credits,
            credits_uncertain=self.money.credits_uncertain,
            rate=rate,
            seconds_left=left / rate if rate else None,
            stopping=self.stopping,
        )

    def _rate(self) -> float | None:
        """Items ended per second, over the last of them."""
        if len(self._ends) < 8 or (span := time.monotonic() - self._ends[0]) <= 0:
            return None
        return (len(self._ends) - 1) / span
