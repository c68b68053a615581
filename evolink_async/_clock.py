"""The time a session lives by: the event loop's, or one a test can own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol, runtime_checkable

__all__ = ["Clock", "LoopClock", "default", "hold"]


@runtime_checkable
class Clock(Protocol):
    """Where a session takes its time from (HTTP time-outs excepted).

    A clock may also have ``hold()``, a context manager during which its time
    stands still: the session enters it while an exchange with the API is in the air.
    """

    def now(self) -> float:
        """Seconds on a scale that never goes back; only differences mean something."""
        ...

    async def sleep_until(self, when: float) -> None:
        """Return once `now` has reached *when*; may be cancelled."""
        ...


class LoopClock:
    """Monotonic time, slept through on the running event loop."""

    now = staticmethod(time.monotonic)

    async def sleep_until(self, when: float) -> None:
        """Sleep on the loop."""
        await asyncio.sleep(max(0.0, when - self.now()))


default: Callable[[], Clock] = LoopClock
"""Makes the clock of a session that is given none; the pytest plugin puts its own here."""


def hold(clock: Clock) -> AbstractContextManager[object]:
    """*clock* held still, if it can be."""
    holder = getattr(clock, "hold", None)
    return holder() if holder is not None else _NOTHING


_NOTHING: Final = nullcontext()
