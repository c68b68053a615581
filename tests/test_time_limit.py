"""One timer for many: who is late is told so, and nobody else is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from evolink_async._time_limit import TimeLimit


async def spend(limit: TimeLimit, event: asyncio.Event) -> str:
    with limit:
        await event.wait()
    return "in time"


async def test_who_is_late_is_told(limit: TimeLimit) -> None:
    """Each has its own time from when it entered; who has left is not meant."""
    never, soon = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    quick = asyncio.create_task(spend(limit, soon))
    first = asyncio.create_task(spend(limit, never))
    loop.call_later(0.01, soon.set)
    start = loop.time()
    assert await quick == "in time"
    second = asyncio.create_task(spend(limit, never))
    for late in (first, second):
        with pytest.raises(TimeoutError):
            await late
    assert loop.time() - start >= 0.05
    assert first.cancelling() == second.cancelling() == 0
    again = asyncio.create_task(spend(limit, soon))
    assert await again == "in time"


@pytest.fixture
def limit() -> TimeLimit:
    return TimeLimit(0.05)


async def test_one_timer_serves_all(limit: TimeLimit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand that are in time set one timer."""
    loop = asyncio.get_running_loop()
    timers: list[float] = []
    call_later = loop.call_later

    def note(delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        timers.append(delay)
        return call_later(delay, callback)

    monkeypatch.setattr(loop, "call_later", note)
    done = asyncio.Event()
    done.set()
    for _ in range(1000):
        assert await spend(limit, done) == "in time"
    assert timers == [0.05]
    limit.stop()


async def test_who_is_cancelled_stays_cancelled(limit: TimeLimit) -> None:
    """Before its time, or in the same moment as it is late."""
    never = asyncio.Event()
    early = asyncio.create_task(spend(limit, never))
    await asyncio.sleep(0)
    early.cancel()
    with pytest.raises(asyncio.CancelledError):
        await early
    both = asyncio.create_task(spend(limit, never))
    await asyncio.sleep(0)
    time.sleep(0.06)  # noqa: ASYNC251 - nobody else may run meanwhile
    limit._ring()
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
    assert both.cancelled()


async def test_what_it_raises_itself_counts(limit: TimeLimit) -> None:
    """Another error of the block is that error, late or not, and nothing is left cancelled."""

    async def fail() -> None:
        with limit:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise LookupError from None

    failing = asyncio.create_task(fail())
    with pytest.raises(LookupError):
        await failing
    assert failing.cancelling() == 0


async def test_inside_a_timeout_of_the_callers(limit: TimeLimit) -> None:
    """Which of the two was late is told apart."""
    outer: asyncio.Timeout | None = None
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10) as outer:
            await spend(limit, asyncio.Event())
    assert outer is not None
    assert not outer.expired()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01) as outer:
            await spend(TimeLimit(10), asyncio.Event())
    assert outer.expired()
