"""The gate on a clock moved by hand: seats, order, cool-down, slow start, rate."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Callable

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from evolink_async import APIStatusError, RateLimitError, ServerError
from evolink_async._http.limiter import Gate

START = 1000.0


async def settle() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


@define
class HandClock:
    """Time stands still until `advance`."""

    time: float = START
    _sleepers: list[tuple[float, int, asyncio.Future[None]]] = field(factory=list)
    _order: itertools.count[int] = field(factory=itertools.count)

    def now(self) -> float:
        return self.time

    async def sleep_until(self, when: float) -> None:
        if when > self.time:
            future = asyncio.get_running_loop().create_future()
            heapq.heappush(self._sleepers, (when, next(self._order), future))
            await future

    async def advance(self, seconds: float) -> None:
        """Pass *seconds*, stopping wherever somebody sleeps until."""
        end = self.time + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.time, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
            await settle()
        self.time = end
        await settle()


@define
class Crowd:
    """Requests that come to a gate; notes who got in, in order and when."""

    gate: Gate
    clock: HandClock
    entered: list[str] = field(factory=list)
    times: list[float] = field(factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(factory=dict)

    async def come(self, *names: str, model: str = "") -> None:
        """Each name comes, in order; those beginning with s are submits."""
        for name in names:
            self.tasks[name] = asyncio.get_running_loop().create_task(self._come(name, model))
            await settle()

    async def _come(self, name: str, model: str) -> None:
        await self.gate.enter(submit=name.startswith("s"), model=model)
        self.entered.append(name)
        self.times.append(self.clock.now())

    async def leave(self, *names: str) -> None:
        """Those who are in give their seats back."""
        for name in names:
            assert name in self.entered
            self.gate.leave(submit=name.startswith("s"))
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
        await settle()

    async def go(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        await self.gate.aclose()


MakeCrowd = Callable[..., Crowd]


@pytest.fixture
async def crowd_at() -> AsyncIterator[MakeCrowd]:
    """Makes a gate of so many seats, and a crowd before it."""
    crowds: list[Crowd] = []

    def make(seats: int = 16, *, rate: float | None = None, start: float = START) -> Crowd:
        clock = HandClock(start)
        crowds.append(Crowd(Gate(clock, seats=seats, rate=rate), clock))
        return crowds[-1]

    yield make
    for crowd in crowds:
        await crowd.go()


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cool-downs are as short as their jitter allows."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{k}" for k in range(count)]


def throttle(
    retry_after: float | None = None, *, status: int = 429, code: str | None = None
) -> APIStatusError:
    kind = RateLimitError if status == 429 else ServerError
    return kind("patience", status=status, code=code, retry_after=retry_after, from_api=True)


# -- seats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seats", "submits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (16, 14), (100, 98)]
)
async def test_seats_kept_for_reads(crowd_at: MakeCrowd, seats: int, submits: int) -> None:
    """Submits take all seats but two, all but one of two or three; reads can take them all."""
    crowd = crowd_at(seats)
    await crowd.come(*names("s", seats + 3))
    assert crowd.entered == names("s", submits)
    await crowd.come(*names("r", seats + 3))
    assert crowd.entered[submits:] == names("r", seats - submits)
    reads = crowd_at(seats)
    await reads.come(*names("r", seats + 3))
    assert reads.entered == names("r", seats)
    assert reads.gate.waiting == 3


async def test_a_seat_given_back_goes_to_the_first_in_line(crowd_at: MakeCrowd) -> None:
    """Waiters of both kinds are served in the order they came."""
    crowd = crowd_at(4)
    await crowd.come("r0", "r1", "r2", "r3", "s4", "r5", "s6", "r7")
    assert crowd.entered == ["r0", "r1", "r2", "r3"]
    for out, served in [("r0", "s4"), ("r1", "r5"), ("r2", "s6"), ("r3", "r7")]:
        await crowd.leave(out)
        assert crowd.entered[-1] == served


async def test_reads_pass_submits_that_have_no_seat(crowd_at: MakeCrowd) -> None:
    """A burst of submits does not hold reads up, and keeps its own order."""
    crowd = crowd_at(4)
    await crowd.come("s0", "s1", "s2", "s3", "r0", "r1", "r2")
    assert crowd.entered == ["s0", "s1", "r0", "r1"]
    await crowd.leave("r0")
    assert crowd.entered[-1] == "r2"
    await crowd.leave("s0", "s1")
    assert crowd.entered[-2:] == ["s2", "s3"]


async def test_nobody_overtakes_a_waiter_whose_time_has_come(crowd_at: MakeCrowd) -> None:
    """A read that arrives as a cool-down ends queues behind the submit that waited for it."""
    crowd = crowd_at(4)
    crowd.gate.cool_down(throttle(10), sent_at=START)
    await crowd.come("s0")
    crowd.clock.time += 10  # the alarm has not rung yet
    await crowd.come("r0")
    await crowd.clock.advance(0)
    assert crowd.entered == ["s0"]


async def test_a_cancelled_waiter_leaves_no_trace(crowd_at: MakeCrowd) -> None:
    """Cancelled in the queue, in the middle of it too, it takes no seat and blocks nobody."""
    crowd = crowd_at(2)
    await crowd.come("r0", "r1", "r2", "r3", "r4")
    assert crowd.gate.waiting == 3
    await crowd.cancel("r3", "r2")
    await crowd.leave("r0")
    assert crowd.entered == ["r0", "r1", "r4"]
    assert crowd.gate.waiting == 0


async def test_a_waiter_cancelled_as_it_gets_its_seat_gives_it_back(crowd_at: MakeCrowd) -> None:
    """Cancelled between being let in and running, it passes the seat on."""
    crowd = crowd_at(1)
    await crowd.come("r0", "r1", "r2")
    crowd.gate.leave()  # r1 has the seat now but has not run
    crowd.tasks["r1"].cancel()
    await settle()
    assert crowd.entered == ["r0", "r2"]
    await crowd.leave("r2")
    await crowd.come("r3")
    assert crowd.entered[-1] == "r3"


@examples(150)
@given(
    seats=st.integers(1, 6),
    moves=st.lists(st.tuples(st.sampled_from("rsxl"), st.integers(0, 9)), max_size=40),
)
def test_seats_are_never_lost_or_doubled(*, seats: int, moves: list[tuple[str, int]]) -> None:
    """After any coming, leaving and cancelling, all seats can be taken, and never more."""

    async def play() -> None:
        crowd = Crowd(Gate(HandClock(), seats=seats), HandClock())
        inside: list[str] = []
        for k, (move, which) in enumerate(moves):
            if move in "rs":
                await crowd.come(f"{move}{k}")
            elif move == "x":
                waiting = [name for name, task in crowd.tasks.items() if not task.done()]
                await crowd.cancel(*waiting[which : which + 1])
            elif inside:
                gone = inside[which % len(inside)]
                inside.remove(gone)
                crowd.entered.remove(gone)
                crowd.gate.leave(submit=gone.startswith("s"))
                await settle()
            inside = list(crowd.entered)
            assert len(inside) <= seats
        await crowd.cancel(*crowd.tasks)
        for name in inside:
            crowd.gate.leave(submit=name.startswith("s"))
        assert crowd.gate.waiting == 0
        after = Crowd(crowd.gate, crowd.clock)
        await after.come(*names("r", seats + 1))
        assert after.entered == names("r", seats)
        await after.go()

    asyncio.run(play())


# -- cool-down ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_a_cool_down_closes_the_gate_for_all(crowd_at: MakeCrowd, status: int) -> None:
    """One 429 or 503 holds reads and submits back for as long as Retry-After says."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(30, status=status), sent_at=START)
    assert crowd.gate.closed_until == START + 30
    await crowd.come("r0", "s0")
    await crowd.clock.advance(29.9)
    assert crowd.entered == []
    await crowd.clock.advance(0.1)
    assert crowd.entered == ["r0"]
    assert crowd.gate.cool_downs == 1


async def test_the_gate_is_open_at_first(crowd_at: MakeCrowd) -> None:
    """No cool-down ends in the future before there has been one, whatever the clock says."""
    crowd = crowd_at(start=-500.0)
    assert crowd.gate.closed_until < crowd.clock.now()
    await crowd.come("s0")
    assert crowd.entered == ["s0"]


async def test_retry_after_is_capped(crowd_at: MakeCrowd) -> None:
    """The session waits at most 300 s, however long it is asked to."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(86400), sent_at=START)
    assert crowd.gate.closed_until == START + 300


async def test_a_cool_down_is_a_little_late(
    crowd_at: MakeCrowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jitter of at most a tenth is added, never taken off."""
    monkeypatch.setattr("random.uniform", lambda _, high: high)
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(30), sent_at=START)
    assert crowd.gate.closed_until == pytest.approx(START + 33)
    capped = crowd_at()
    capped.gate.cool_down(throttle(9999), sent_at=START)
    assert capped.gate.closed_until == pytest.approx(START + 330)


@pytest.mark.parametrize("retry_after", [None, 0.0])
async def test_without_seconds_cool_downs_grow(
    crowd_at: MakeCrowd, retry_after: float | None
) -> None:
    """1, 2, 4 ... 60 s in a row; a success starts over. "At once" counts as no number."""
    crowd = crowd_at()
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        crowd.gate.cool_down(throttle(retry_after), sent_at=crowd.clock.now())
        assert crowd.gate.closed_until == crowd.clock.now() + seconds
        await crowd.clock.advance(seconds)
    crowd.gate.succeeded(sent_at=crowd.clock.now())
    crowd.gate.cool_down(throttle(retry_after), sent_at=crowd.clock.now())
    assert crowd.gate.closed_until == crowd.clock.now() + 1


async def test_one_burst_is_one_cool_down(
    crowd_at: MakeCrowd, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixteen refusals of requests that were in the air together neither add up nor repeat."""
    crowd = crowd_at()
    with caplog.at_level(logging.WARNING):
        for k in range(16):
            crowd.gate.cool_down(throttle(), sent_at=START - k)
    assert crowd.gate.closed_until == START + 1
    assert crowd.gate.cool_downs == 1
    assert len(caplog.records) == 1


async def test_a_longer_retry_after_of_the_same_burst_counts(crowd_at: MakeCrowd) -> None:
    """Every Retry-After is obeyed, also of an answer to an older request; none shortens."""
    crowd = crowd_at()
    for seconds, end in [(5, 5), (20, 20), (10, 20)]:
        crowd.gate.cool_down(throttle(seconds), sent_at=START - 1)
        assert crowd.gate.closed_until == START + end
    assert crowd.gate.cool_downs == 1


async def test_a_cool_down_while_waiting_for_one_is_waited_for(crowd_at: MakeCrowd) -> None:
    """Who waits for a cool-down to end waits for its extension too."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(10), sent_at=START)
    await crowd.come("r0")
    await crowd.clock.advance(5)
    crowd.gate.cool_down(throttle(10), sent_at=START)
    await crowd.clock.advance(9.9)
    assert crowd.entered == []
    await crowd.clock.advance(0.1)
    assert crowd.entered == ["r0"]


# -- slow start --------------------------------------------------------------------------------


async def test_after_a_cool_down_the_gate_opens_slowly(crowd_at: MakeCrowd) -> None:
    """One request first; each success admits one more, until all seats are open."""
    crowd = crowd_at(4)
    crowd.gate.cool_down(throttle(10), sent_at=START)
    await crowd.come(*names("r", 12))
    await crowd.clock.advance(10)
    assert crowd.entered == ["r0"]
    for left, in_air in enumerate((2, 3, 4, 4)):
        before = len(crowd.entered)
        crowd.gate.succeeded(sent_at=crowd.clock.now())
        await settle()
        assert len(crowd.entered) == before + (left < 3)
        await crowd.leave(f"r{left}")
        assert len(crowd.entered) - (left + 1) == in_air


async def test_a_cool_down_too_short_to_tell_ends_all_the_same(crowd_at: MakeCrowd) -> None:
    """Whoever comes after it is told from those before, also by a clock of large numbers."""
    crowd = crowd_at(4, start=1757156493.0)
    crowd.gate.cool_down(throttle(1e-8), sent_at=crowd.clock.now())
    await crowd.come("r0")
    await crowd.clock.advance(0.01)
    crowd.gate.succeeded(sent_at=crowd.times[0])
    crowd.gate.leave(entered=crowd.times[0])
    crowd.gate.cool_down(throttle(1e-8), sent_at=crowd.clock.now())
    await crowd.come("r1")
    await crowd.clock.advance(0.01)
    crowd.gate.leave(entered=crowd.times[1])
    await crowd.come("r2")
    assert crowd.entered == ["r0", "r1", "r2"]


async def test_what_hangs_since_before_a_cool_down_does_not_slow_the_start(
    crowd_at: MakeCrowd,
) -> None:
    """The slow start counts what was let in after the cool-down; seats count everything."""
    crowd = crowd_at(8)
    await crowd.come(*names("r", 4))
    crowd.gate.cool_down(throttle(1), sent_at=START)
    await crowd.come(*names("r1", 8))
    await crowd.clock.advance(1)
    assert crowd.entered[4:] == ["r10"]
    now = crowd.clock.now()
    for let_in in (7, 9):
        crowd.gate.succeeded(sent_at=now)
        crowd.gate.leave(entered=now)
        await settle()
        assert len(crowd.entered) == let_in
    crowd.gate.leave(entered=START)  # one of those that hung, for which the window has no room
    await settle()
    assert len(crowd.entered) == 9
    for _ in range(8):
        crowd.gate.succeeded(sent_at=now)
    await settle()
    assert len(crowd.entered) == 9 + 2  # three that hang and three from after it had two seats left


async def test_a_refusal_during_the_slow_start_starts_it_over(crowd_at: MakeCrowd) -> None:
    """The next cool-down opens one at a time again."""
    crowd = crowd_at(4)
    for _ in range(2):
        crowd.gate.cool_down(throttle(10), sent_at=crowd.clock.now())
        crowd.entered.clear()
        await crowd.come(*names("r", 3))
        await crowd.clock.advance(10)
        assert len(crowd.entered) == 1
        await crowd.cancel(*crowd.tasks)
        await crowd.leave(crowd.entered[0])
        crowd.gate.succeeded(sent_at=crowd.clock.now())


async def test_old_successes_do_not_widen(crowd_at: MakeCrowd) -> None:
    """An answer to a request from before the cool-down says nothing about after it."""
    crowd = crowd_at(4)
    crowd.gate.cool_down(throttle(10), sent_at=START)
    for sent_at in (START - 5, START):
        crowd.gate.succeeded(sent_at=sent_at)
    await crowd.come(*names("r", 3))
    await crowd.clock.advance(10)
    assert crowd.entered == ["r0"]
    crowd.gate.cool_down(throttle(), sent_at=crowd.clock.now())
    assert crowd.gate.closed_until == crowd.clock.now() + 1


# -- one model ---------------------------------------------------------------------------------

NO_CHANNEL = "no_available_channel"


async def test_no_channel_holds_back_that_models_submits_only(crowd_at: MakeCrowd) -> None:
    """Other models' submits and all reads go on; that model's wait until the time is over."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(10, status=503, code=NO_CHANNEL), sent_at=START, model="busy")
    await crowd.come("s0", model="busy")
    await crowd.come("s1", model="other")
    await crowd.come("r0", model="busy")
    assert crowd.entered == ["s1", "r0"]
    assert crowd.gate.closed_until < START
    assert crowd.gate.cool_downs == 0
    await crowd.clock.advance(10)
    assert crowd.entered[-1] == "s0"
    crowd.gate.succeeded(sent_at=crowd.clock.now(), model="busy")
    await crowd.come("s2", model="busy")
    assert crowd.entered[-1] == "s2"


async def test_a_model_comes_back_slowly(crowd_at: MakeCrowd) -> None:
    """One submit tries it, each success lets one more in; other models go on meanwhile."""
    crowd = crowd_at()
    gate = crowd.gate
    await crowd.come("s0", model="busy")
    gate.cool_down(throttle(10, code=NO_CHANNEL), sent_at=START, model="busy")
    await crowd.come(*names("s1", 8), model="busy")
    await crowd.clock.advance(10)
    assert crowd.entered == ["s0", "s10"]
    gate.leave(submit=True, model="busy", entered=START)  # s0, which is from before
    await crowd.clock.advance(1)
    await crowd.come("s2", model="other")
    assert crowd.entered == ["s0", "s10", "s2"]
    now = crowd.clock.now()
    gate.cool_down(throttle(10, code=NO_CHANNEL), sent_at=now, model="busy")
    gate.leave(submit=True, model="busy", entered=START + 10)
    await crowd.clock.advance(9)
    assert len(crowd.entered) == 3
    await crowd.clock.advance(1)
    for let_in in (1, 2, 3, 4):
        assert len(crowd.entered) == 2 + 2 * let_in
        entered = crowd.clock.now()
        gate.succeeded(sent_at=entered, model="busy")
        gate.leave(submit=True, model="busy", entered=entered)
        await crowd.clock.advance(0)


async def test_no_channel_without_a_model_cools_the_session(crowd_at: MakeCrowd) -> None:
    """Where nobody knows the model, it is an answer like any other 503."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(10, status=503, code=NO_CHANNEL), sent_at=START)
    assert crowd.gate.closed_until == START + 10


async def test_a_burst_without_a_channel_is_one_hold(crowd_at: MakeCrowd) -> None:
    """Fourteen refusals that were in the air together hold the model for 1 s, not for 60."""
    crowd = crowd_at()
    for _ in range(14):
        crowd.gate.cool_down(throttle(code=NO_CHANNEL), sent_at=START, model="busy")
    await crowd.come("s0", model="busy")
    await crowd.clock.advance(1)
    assert crowd.entered == ["s0"]
    crowd.gate.cool_down(throttle(), sent_at=START + 1)
    assert crowd.gate.closed_until == START + 2  # the session's own first


async def test_holds_of_a_model_grow_until_it_succeeds(crowd_at: MakeCrowd) -> None:
    """1, 2, 4 s in a row for that model; its success starts over, other successes do not."""
    crowd = crowd_at()
    for k, seconds in enumerate((1, 2, 4)):
        now = crowd.clock.now()
        crowd.gate.cool_down(throttle(code=NO_CHANNEL), sent_at=now, model="busy")
        await crowd.come(f"s{k}", model="busy")
        await crowd.clock.advance(seconds - 0.1)
        assert len(crowd.entered) == k
        await crowd.clock.advance(0.1)
        assert len(crowd.entered) == k + 1
        crowd.gate.succeeded(sent_at=crowd.clock.now(), model="other")
        crowd.gate.succeeded(sent_at=now, model="busy")  # sent before the hold
    crowd.gate.succeeded(sent_at=crowd.clock.now(), model="busy")
    crowd.gate.cool_down(throttle(code=NO_CHANNEL), sent_at=crowd.clock.now(), model="busy")
    await crowd.come("s9", model="busy")
    await crowd.clock.advance(1)
    assert crowd.entered[-1] == "s9"


async def test_a_submit_already_queued_is_held_too(crowd_at: MakeCrowd) -> None:
    """A submit that gets its seat after the refusal gives it back and waits."""
    crowd = crowd_at(1)
    await crowd.come("s0", "s1", model="busy")
    await crowd.come("r0")
    crowd.gate.cool_down(throttle(10, code=NO_CHANNEL), sent_at=START, model="busy")
    await crowd.leave("s0")
    assert crowd.entered == ["s0", "r0"]
    await crowd.leave("r0")
    await crowd.clock.advance(10)
    assert crowd.entered == ["s0", "r0", "s1"]


async def test_a_hold_that_grows_is_waited_for(crowd_at: MakeCrowd) -> None:
    """Who waits for a model waits for its extension too, and can be cancelled."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(10, code=NO_CHANNEL), sent_at=START, model="busy")
    await crowd.come("s0", "s1", model="busy")
    crowd.gate.cool_down(throttle(20, code=NO_CHANNEL), sent_at=START, model="busy")
    await crowd.clock.advance(15)
    assert crowd.entered == []
    await crowd.cancel("s0")
    await crowd.clock.advance(5)
    assert crowd.entered == ["s1"]


# -- rate --------------------------------------------------------------------------------------


async def test_the_rate_is_kept(crowd_at: MakeCrowd) -> None:
    """One request at once, then one each 1/rate seconds, on the clock."""
    crowd = crowd_at(100, rate=4)
    await crowd.come(*names("r", 10))
    assert crowd.entered == names("r", 1)
    await crowd.clock.advance(10)
    assert crowd.times == [START + k / 4 for k in range(10)]
    assert crowd.entered == names("r", 10)


async def test_a_rate_below_one(crowd_at: MakeCrowd) -> None:
    """A request each four seconds is a rate too."""
    crowd = crowd_at(rate=0.25)
    await crowd.come("r0", "s1", "r2")
    await crowd.clock.advance(8)
    assert crowd.entered == ["r0", "s1", "r2"]
    assert crowd.times == [START, START + 4, START + 8]


async def test_rest_is_not_saved_up(crowd_at: MakeCrowd) -> None:
    """An hour of silence earns one request, not a bunch."""
    crowd = crowd_at(100, rate=5)
    await crowd.clock.advance(3600)
    await crowd.come(*names("r", 20))
    assert len(crowd.entered) == 1


async def test_a_seat_declined_gives_its_token_back(crowd_at: MakeCrowd) -> None:
    """A waiter cancelled as it gets its seat has not used up the rate."""
    crowd = crowd_at(1, rate=2)
    await crowd.come("r0", "r1", "r2")
    await crowd.clock.advance(0.5)
    crowd.gate.leave()
    crowd.tasks["r1"].cancel()
    await settle()
    assert crowd.entered == ["r0", "r2"]
    assert crowd.times == [START, START + 0.5]


async def test_rate_and_cool_down_together(crowd_at: MakeCrowd) -> None:
    """A waiter of the rate waits for a cool-down as well."""
    crowd = crowd_at(rate=1)
    await crowd.come("r0", "r1")
    crowd.gate.cool_down(throttle(30), sent_at=START)
    await crowd.leave("r0")
    await crowd.clock.advance(29)
    assert crowd.entered == ["r0"]
    await crowd.clock.advance(1)
    assert crowd.entered == ["r0", "r1"]


@pytest.mark.parametrize("rate", [0.3, 3, 7, 1e5])
async def test_no_rate_stalls_or_spins(crowd_at: MakeCrowd, rate: float) -> None:
    """Rates that binary fractions cannot say still let everybody in, in order."""
    crowd = crowd_at(100, rate=rate, start=1e7 + 1 / 3)
    await crowd.come(*names("r", 30))
    await crowd.clock.advance(31 / rate + 1)
    assert crowd.entered == names("r", 30)


# -- the end -----------------------------------------------------------------------------------


async def test_closing_leaves_nothing_running(crowd_at: MakeCrowd) -> None:
    """The gate's alarm does not outlive it; closing twice is closing once."""
    crowd = crowd_at()
    crowd.gate.cool_down(throttle(10), sent_at=START)
    await crowd.come("r0")
    assert len(asyncio.all_tasks()) == 3  # this test, the waiter, the alarm
    await crowd.cancel("r0")
    await crowd.gate.aclose()
    await crowd.gate.aclose()
    assert len(asyncio.all_tasks()) == 1


# -- taking turns ------------------------------------------------------------------


async def test_reads_and_submits_take_turns_at_a_rate(crowd_at: MakeCrowd) -> None:
    """However many submits wait for their tokens, every second one is a read's if one waits."""
    crowd = crowd_at(16, rate=1.0)
    await crowd.come(*names("s", 6))
    alone = crowd.gate.is_contended
    await crowd.come("r0")
    assert (alone, crowd.gate.is_contended) == (True, False)
    await crowd.clock.advance(1)
    await crowd.come("r1")
    await crowd.clock.advance(4)
    assert crowd.entered == ["s0", "r0", "s1", "r1", "s2", "s3"]


async def test_without_a_rate_nobody_has_to_queue(crowd_at: MakeCrowd) -> None:
    """Reads have seats of their own there."""
    crowd = crowd_at(4)
    await crowd.come(*names("s", 6))
    assert not crowd.gate.is_contended


@define
class TickingClock:
    """Time passes whenever somebody looks at it."""

    tick: float
    time: float = START

    def now(self) -> float:
        self.time += self.tick
        return self.time

    async def sleep_until(self, when: float) -> None:
        self.time = max(self.time, when)


@pytest.mark.parametrize("early", [step * 0.0005 for step in range(1, 20)])
async def test_a_token_that_comes_while_it_is_looked_for(early: float) -> None:
    """Whoever asks a moment too early is let in a moment later, also if nobody else comes."""
    clock = TickingClock(tick=0.001)
    gate = Gate(clock, seats=4, rate=100)
    await gate.enter()
    gate.leave()
    clock.time += 0.01 - early
    entering = asyncio.create_task(gate.enter())
    await settle()
    assert entering.done()


async def test_seats_that_many_in_a_row_do_not_take(crowd_at: MakeCrowd) -> None:
    """However many give their seat back at once, the next in the queue gets it."""
    gate = crowd_at(seats=1).gate
    await gate.enter(submit=True)
    let_in = 0
    loop = asyncio.get_running_loop()

    def decline() -> None:
        nonlocal let_in
        let_in += 1
        gate.decline(submit=True)

    for _ in range(5000):
        gate.queue(loop.create_future(), decline, submit=True)
    gate.leave(submit=True)
    assert let_in == 5000
    assert gate.find_seat(submit=True)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks run eagerly since Python 3.12")
@pytest.mark.parametrize("early", [step * 0.0005 for step in range(1, 20)])
async def test_a_token_that_comes_while_tasks_run_eagerly(early: float) -> None:
    """Also where the gate's own task runs at once, nobody waits for good."""
    loop = asyncio.get_running_loop()
    clock = TickingClock(tick=0.001)
    gate = Gate(clock, seats=4, rate=100)
    await gate.enter()
    gate.leave()
    clock.time += 0.01 - early
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - not in 3.11
    try:
        entering = asyncio.create_task(gate.enter())
        await settle()
        assert entering.done()
    finally:
        loop.set_task_factory(None)


async def test_the_alarm_is_the_gates_own() -> None:
    """Task factories that refuse it, or who cancels all there is, leave nobody waiting for good."""
    clock = HandClock()
    gate = Gate(clock, seats=4, rate=1)
    await gate.enter()
    loop = asyncio.get_running_loop()
    entering = [asyncio.create_task(gate.enter()) for _ in range(2)]
    loop.set_task_factory(lambda *_, **__: pytest.fail("asked for a task"))
    try:
        await settle()
        alarm = gate._alarm
        assert alarm is not None
        alarm.cancel()  # while it sleeps
        for _ in range(2):
            await asyncio.sleep(0)
        assert gate._alarm not in {alarm, None}
        gate._alarm.cancel()  # before its first step
        await clock.advance(1)
        assert [task.done() for task in entering] == [True, False]
        assert gate._alarm is not None
        gate._alarm.cancel()
        await clock.advance(1)
        assert entering[1].done()
    finally:
        loop.set_task_factory(None)


async def test_a_clock_that_cannot_sleep_reaches_who_waits() -> None:
    """Nobody waits for good for a token that nobody can wait for."""

    class Sleepless(HandClock):
        async def sleep_until(self, when: float) -> None:
            raise OSError(f"no sleep until {when}")

    gate = Gate(Sleepless(), seats=4, rate=1)
    await gate.enter()
    for _ in range(2):
        with pytest.raises(OSError, match="no sleep"):
            await gate.enter(submit=True)
