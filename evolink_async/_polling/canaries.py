"""Canaries: tasks with a callback that are polled all the same, to notice lost callbacks."""

from __future__ import annotations

import math
from typing import Final

from attrs import define, field

from evolink_async._polling.pricing import CallbackTrust

__all__ = ["Canaries"]

_EVERY: Final = (16, 128)
"""One in so many tasks is a canary: until callbacks have proven to come, and afterwards."""
_PROVEN: Final = 32
"""Callbacks that came from which others are expected to come as well."""
_USEFULNESS: Final = 0.5
"""What part of a canary's poll is useful when all canaries are polled together."""
_FEW_MISSED: Final = 0.3
"""Share of missed callbacks up to which polls of tasks with callbacks share no price."""


@define
class Canaries:
    """Chooses them, and prices the polls of all tasks with a callback.

    Attributes:
        trust: How many callbacks have come of late, and how many not.
        running: Canaries that are watched now.
    """

    trust: CallbackTrust
    running: int = field(default=0, init=False)
    _submitted: int = field(default=0, init=False)
    _hurried_at: float = field(default=-math.inf, init=False)

    def choose(self, watched: int) -> bool:
        """Whether the task submitted now is one, while *watched* others run.

        Only where many run, which would all wait for callbacks that nobody has seen yet: a
        lone task teaches as much by the first callback that is missed.
        """
        self._submitted += 1
        every = _EVERY[self.trust.heard >= _PROVEN]
        return self._submitted % every == 0 and watched >= every // 2

    def canary_price(self, single: float) -> float:
        """What a poll of a canary may cost, where a *single* one may cost that."""
        return single / max(1.0, _USEFULNESS * self.running)

    def price(self, shared: float, single: float) -> float:
        """What a poll of any other task with a callback may cost.

        While callbacks come, hardly two such tasks are due together, so that they pay the
        price of a *single* poll, not a *shared* one.
        """
        part = min(1.0, self.trust.missed / _FEW_MISSED)
        return self.trust.price(part * shared + (1 - part) * single)

    def saw_missed(self, now: float, *, pause: float) -> bool:
        """Note a missed callback; True if callbacks seem to have stopped just now.

        At most once in *pause* seconds.
        """
        before = self.trust.missed
        self.trust.saw_missed()
        if self.trust.missed <= 2 * before or now < self._hurried_at + pause:
            return False
        self._hurried_at = now
        return True
