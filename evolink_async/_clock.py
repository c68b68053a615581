"""A session's clock, the event loop's or one a test can own, and a timer that follows it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol, runtime_checkable

from attrs import define, field

__all__ = [
    "AT_ONCE",
    "NEVER",
    "Clock",
    "LoopClock",
    "SuspendWatch",
    "Timer",
    "default",
    "hold",
    "sleep",
]

AT_ONCE: Final = math.nextafter(-math.inf, 0.0)
"""A due time before all others."""
NEVER: Final = math.inf

_SUSPENDED: Final = 30.0
"""Seconds by which the time of day runs ahead of the clock if the machine was suspended."""


@runtime_checkable
class Clock(Protocol):
    """Where a session takes its time from (HTTP time-outs excepted).

    A clock may also have ``hold()``, a context manager during which its time
    stands still: the session enters it while an exchange with the API is in flight.
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


async def sleep(clock: Clock, seconds: float) -> None:
    """Sleep on *clock*."""
    if seconds > 0:
        await clock.sleep_until(clock.now() + seconds)


def hold(clock: Clock) -> AbstractContextManager[object]:
    """*clock* held still, if it can be."""
    return getattr(clock, "hold", nullcontext)()


class Timer:
    """Calls back once, at a time that may be moved.

    Attributes:
        at: When it is set for, `NEVER` if it is not.
        closed: True once it calls back no more.
    """

    def __init__(
        self, clock: Clock, on_time: Callable[[], None], on_crash: Callable[[BaseException], None]
    ) -> None:
        """A timer that is not set; *on_crash* is called if the clock fails."""
        self._clock = clock
        self._on_time = on_time
        self._on_crash = on_crash
        self._sleeper: asyncio.Task[None] | asyncio.Handle | None = None
        self.at = NEVER
        self.closed = False

    def set(self, at: float) -> None:
        """Call back at *at*, or earlier if it is set for earlier; for `NEVER` not at all."""
        if self.closed or (self._sleeper is not None and self.at <= at < NEVER):
            return
        self._cancel()
        if at == NEVER:
            return
        self.at = at
        loop = asyncio.get_running_loop()
        if at == AT_ONCE:
            self._sleeper = loop.call_soon(self._is_time)
        elif isinstance(self._clock, LoopClock):  # the same as to sleep, cheaper
            self._sleeper = loop.call_later(at - self._clock.now(), self._is_time)
        else:  # not made by a task factory of the caller's: that may refuse
            self._sleeper = asyncio.Task(self._sleep(at), loop=loop)
            self._sleeper.add_done_callback(self._woke)

    def close(self) -> None:
        """Call back no more."""
        self._cancel()
        self.closed = True

    def _cancel(self) -> None:
        if self._sleeper is not None:
            self._sleeper.cancel()
        self._sleeper, self.at = None, NEVER

    async def _sleep(self, at: float) -> None:
        await self._clock.sleep_until(at)

    def _woke(self, sleeper: asyncio.Task[None]) -> None:
        if sleeper is not self._sleeper:
            return
        if sleeper.cancelled():
            self._on_crash(asyncio.CancelledError("cancelled by others"))
        elif (crash := sleeper.exception()) is not None:
            self._on_crash(crash)
        self._is_time()

    def _is_time(self) -> None:
        self._sleeper, self.at = None, NEVER
        self._on_time()


@define
class SuspendWatch:
    """Notices that the machine was suspended: the time of day ran ahead of the clock.

    Attributes:
        resumed_at: When it last resumed, on the session's clock.
        retry: True until the first poll after that is answered, which may have gone out on a
            dead connection.
    """

    _clock: Clock
    _wall: Callable[[], float] | None
    _ahead: float = field(init=False)
    resumed_at: float = field(default=-math.inf, init=False)
    retry: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._ahead = 0.0 if self._wall is None else self._wall() - self._clock.now()

    def seconds(self) -> float:
        """How long the machine was suspended since this was last asked, 0 if it was not."""
        if self._wall is None:
            return 0.0
        now = self._clock.now()
        before, self._ahead = self._ahead, self._wall() - now
        slept = self._ahead - before
        if slept <= _SUSPENDED:
            return 0.0
        self.resumed_at, self.retry = now, True
        return slept
