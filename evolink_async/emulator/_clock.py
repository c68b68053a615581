"""The clocks of an emulator: real time, a multiple of it, or a time that tests move.

A clock has ``now()`` and ``sleep_until(when)``; `ManualClock` has ``hold()`` besides.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from evolink_async.emulator._rules import LONGEST

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EPOCH", "Clock", "ManualClock", "RealClock"]

EPOCH = 1_757_156_493.0
"""Where a `ManualClock` starts: the ``created`` of the API page's example, in Unix seconds."""


class Clock(Protocol):
    """What the emulator asks of a clock. ``hold()`` is optional: see `ManualClock`."""

    def now(self) -> float:
        """Seconds that never go back; the emulator shows them as Unix time."""
        ...

    async def sleep_until(self, when: float) -> None:
        """Return once `now` has reached *when*."""
        ...


def held(clock: Clock) -> AbstractContextManager[object]:
    """*clock* held still, if it can be."""
    hold = getattr(clock, "hold", None)
    return hold() if hold is not None else nullcontext()


class RealClock:
    """Unix time that never goes back, *scale* times as fast as the real one.

    With ``scale=60`` a generation of one minute takes a second.

    Args:
        scale: Emulated seconds per real second.

    Raises:
        ValueError: *scale* is not a positive number.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be a positive number, not {scale!r}")
        self.scale = scale
        self._origin = time.time()
        self._start = time.monotonic()

    def __repr__(self) -> str:
        return f"RealClock(scale={self.scale:g})"

    def now(self) -> float:
        """Emulated Unix seconds."""
        return self._origin + (time.monotonic() - self._start) * self.scale

    async def sleep_until(self, when: float) -> None:
        """Sleep the real time it takes until `now` reaches *when*."""
        while (left := when - self.now()) > 0:  # noqa: ASYNC110 - a timer may fire early
            await asyncio.sleep(left / self.scale)


class ManualClock:
    """A time for tests: ten minutes pass as soon as all that is left to do is to wait for them.

    Time stands still until `advance` moves it. With *autoadvance* it also jumps to the earliest
    sleeper once nothing holds it and every event loop that uses it has been quiet for *spins*
    turns. Client and emulator may run in different threads.

    Args:
        start: What `now` says at first, in Unix seconds.
        autoadvance: Jump to the earliest sleeper when all loops are quiet. If false, only
            `advance` moves the time.
        spins: Turns of the event loops without a `hold` or a new sleeper that count as quiet.
    """

    def __init__(self, start: float = EPOCH, *, autoadvance: bool = True, spins: int = 25) -> None:
        self._now = start
        self._autoadvance = autoadvance
        self._spins = spins
        self._lock = threading.RLock()
        self._holds = 0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._cancelled = 0
        # Turns since the last event, per loop that ever slept or held; ticking ones apart.
        self._quiet: dict[asyncio.AbstractEventLoop, int] = {}
        self._ticking: set[asyncio.AbstractEventLoop] = set()

    def __repr__(self) -> str:
        with self._lock:
            waiting = sum(not sleeper.done() for _, _, sleeper in self._sleepers)
            return f"ManualClock(now={self._now:.3f}, holds={self._holds}, sleepers={waiting})"

    def now(self) -> float:
        """Emulated Unix seconds."""
        return self._now

    async def sleep_until(self, when: float) -> None:
        """Sleep until the time has been moved to *when*; may be cancelled."""
        if when <= self._now:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        with self._lock:
            heapq.heappush(self._sleepers, (when, next(self._order), sleeper))
            self._stir(loop)
        try:
            await sleeper
        except asyncio.CancelledError:
            self._forget()
            raise

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the time from jumping while inside; may be nested and used from any thread."""
        loop = asyncio._get_running_loop()  # noqa: SLF001 - the public one raises without a loop
        with self._lock:
            self._holds += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds -= 1
                self._stir(loop)

    def advance(self, seconds: float) -> None:
        """Move the time by *seconds*, even while it is held, and wake the sleepers that are due.

        They wake in the order of their times, and all of them see the new time.

        Raises:
            ValueError: *seconds* is negative, not finite, or more than three centuries.
        """
        if not 0 <= seconds <= LONGEST:
            raise ValueError(f"seconds must be a number from 0 to {LONGEST:g}, not {seconds!r}")
        if self._now + seconds > EPOCH + LONGEST:
            raise ValueError("the clock cannot be moved on by more than three centuries in all")
        with self._lock:
            self._move_to(self._now + seconds)
            self._stir(None)

    # The methods below run under the lock.

    def _stir(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Start counting quiet turns anew in every loop, because something happened."""
        if loop is not None:
            self._quiet.setdefault(loop, 0)
        for other in list(self._quiet):
            if other.is_closed():
                del self._quiet[other]
                self._ticking.discard(other)
            else:
                self._quiet[other] = 0
        self._tick_all()

    def _tick_all(self) -> None:
        if not self._autoadvance or self._holds or self._earliest() == math.inf:
            return
        for loop in self._quiet.keys() - self._ticking:
            if loop.is_running():
                self._ticking.add(loop)
                loop.call_soon_threadsafe(self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count one quiet turn of *loop*, and jump when all loops have been quiet long enough."""
        with self._lock:
            earliest = self._earliest()
            if self._holds or earliest == math.inf:
                self._ticking.discard(loop)
                return
            self._quiet[loop] += 1
            if all(
                turns > self._spins for other, turns in self._quiet.items() if other.is_running()
            ):
                self._move_to(earliest)
                self._stir(None)
        loop.call_soon(self._tick, loop)

    def _earliest(self) -> float:
        """When the next sleeper is due that has not been cancelled."""
        while self._sleepers:
            when, _, sleeper = self._sleepers[0]
            if not sleeper.done() and not sleeper.get_loop().is_closed():
                return when
            heapq.heappop(self._sleepers)
        return math.inf

    def _move_to(self, when: float) -> None:
        self._now = max(self._now, when)
        while self._earliest() <= self._now:
            _, _, sleeper = heapq.heappop(self._sleepers)
            sleeper.get_loop().call_soon_threadsafe(_wake, sleeper)

    def _forget(self) -> None:
        """Count a cancelled sleeper, and clear the heap when half of it may be cancelled ones."""
        with self._lock:
            self._cancelled += 1
            if self._cancelled > 64 and self._cancelled * 2 > len(self._sleepers):
                self._sleepers = [entry for entry in self._sleepers if not entry[2].done()]
                heapq.heapify(self._sleepers)
                self._cancelled = 0


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
