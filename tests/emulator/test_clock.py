"""The emulator's clocks: real time at any speed, and a time that jumps."""

from __future__ import annotations

import asyncio
import threading

import pytest

from evolink_async.emulator import ManualClock, RealClock
from evolink_async.emulator._clock import EPOCH, held


async def test_a_real_clock_runs_at_its_scale() -> None:
    """At scale 10 000 a sleep of 100 s takes some 10 ms and never ends early."""
    clock = RealClock(10_000)
    start = clock.now()
    await clock.sleep_until(start + 100)
    assert clock.now() >= start + 100
    assert repr(clock) == "RealClock(scale=10000)"


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_a_scale_must_be_positive(scale: float) -> None:
    """Time neither stands still nor goes back."""
    with pytest.raises(ValueError, match="positive"):
        RealClock(scale)


async def test_a_clock_that_cannot_be_held_is_not() -> None:
    """Holding a clock without `hold` does nothing."""
    with held(RealClock()):
        pass


async def test_sleepers_wake_in_order_at_their_times() -> None:
    """Time jumps from sleeper to sleeper; each wakes at exactly its time."""
    clock = ManualClock()
    woken: list[float] = []

    async def sleeper(after: float) -> None:
        await clock.sleep_until(EPOCH + after)
        woken.append(clock.now() - EPOCH)

    await asyncio.gather(*(sleeper(after) for after in (600, 3, 3600, 3)))
    assert woken == [3, 3, 600, 3600]


async def test_a_time_that_has_come_does_not_wait() -> None:
    """Sleeping until the past only lets others run."""
    clock = ManualClock()
    await clock.sleep_until(EPOCH - 1)
    assert clock.now() == EPOCH


async def test_a_held_clock_stands_still() -> None:
    """While the clock is held, time does not jump; holds nest."""
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep_until(EPOCH + 10))
    with clock.hold():
        with clock.hold():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert (clock.now(), sleeping.done()) == (EPOCH, False)
        assert repr(clock) == "ManualClock(now=1757156493.000, holds=1, sleepers=1)"
    await sleeping
    assert clock.now() == EPOCH + 10


async def test_time_waits_for_those_who_are_busy() -> None:
    """Work that goes on from turn to turn of the loop is done before time jumps."""
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep_until(EPOCH + 10))
    for _ in range(20):
        await asyncio.sleep(0)
        assert clock.now() == EPOCH
    await sleeping


async def test_a_hold_from_outside_any_loop_counts() -> None:
    """A thread without a loop can hold the clock, too."""
    clock = ManualClock()
    holding, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with clock.hold():
            holding.set()
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    sleeping = asyncio.create_task(clock.sleep_until(EPOCH + 1))
    await asyncio.sleep(0.01)
    assert clock.now() == EPOCH
    let_go.set()
    await sleeping
    thread.join()


async def test_a_cancelled_sleeper_moves_nothing() -> None:
    """Time does not jump to a cancelled sleeper, and the heap does not keep cancelled ones."""
    clock = ManualClock()
    with clock.hold():
        sleepers = [asyncio.create_task(clock.sleep_until(EPOCH + 5)) for _ in range(200)]
        await asyncio.sleep(0)
        for sleeper in sleepers[:150]:
            sleeper.cancel()
        await asyncio.wait(sleepers[:150])
        assert len(clock._sleepers) < 150
        assert "sleepers=50" in repr(clock)
    await asyncio.gather(*sleepers[150:])
    late = asyncio.create_task(clock.sleep_until(EPOCH + 1000))
    await asyncio.sleep(0)
    late.cancel()
    await clock.sleep_until(EPOCH + 7)
    assert clock.now() == EPOCH + 7


async def test_advancing_moves_time_by_hand() -> None:
    """Without autoadvance only `advance` moves time; it wakes every sleeper that is due."""
    clock = ManualClock(start=0, autoadvance=False)
    early, late = (asyncio.create_task(clock.sleep_until(at)) for at in (10, 20))
    await asyncio.sleep(0.01)
    assert clock.now() == 0
    clock.advance(15)
    await early
    assert (clock.now(), late.done()) == (15, False)
    clock.advance(5)
    await late


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
def test_time_does_not_go_back(seconds: float) -> None:
    """Time is advanced by a finite number of seconds, none of them negative."""
    with pytest.raises(ValueError, match="from 0 to"):
        ManualClock().advance(seconds)


async def test_two_loops_share_one_time() -> None:
    """Sleepers of two threads wake in the order of their times; neither overtakes the other."""
    clock = ManualClock()
    woken: list[float] = []

    async def sleeper(first: float) -> None:
        for step in range(20):
            await clock.sleep_until(EPOCH + first + 2 * step)
            woken.append(clock.now() - EPOCH)

    with clock.hold():
        other = threading.Thread(target=lambda: asyncio.run(sleeper(1)))
        other.start()
        while not clock._sleepers:  # noqa: ASYNC110 - the other thread's progress
            await asyncio.sleep(0.001)
        mine = asyncio.create_task(sleeper(2))
        await asyncio.sleep(0)
    await mine
    await asyncio.to_thread(other.join)
    assert woken == [float(second) for second in range(1, 41)]


async def test_a_loop_that_is_gone_holds_nobody_up() -> None:
    """Sleepers left behind in a closed loop are forgotten."""
    clock = ManualClock()

    def leave_one_behind() -> None:
        loop = asyncio.new_event_loop()
        sleeping = loop.create_task(clock.sleep_until(EPOCH + 1))
        loop.run_until_complete(asyncio.sleep(0))
        sleeping.get_coro().close()
        sleeping._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio has no public switch
        loop.close()

    with clock.hold():
        await asyncio.to_thread(leave_one_behind)
    await clock.sleep_until(EPOCH + 5)
    assert clock.now() == EPOCH + 5
