"""The limiter on a clock moved by hand: permits, order, cool-down, slow start, rate."""

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
from evolink_async._http.limiter import Limiter, Permit

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
class Requests:
    """Requests that ask a limiter for permits; notes which got one, in order and when."""

    limiter: Limiter
    clock: HandClock
    admitted: list[str] = field(factory=list)
    times: list[float] = field(factory=list)
    permits: dict[str, Permit] = field(factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(factory=dict)

    @property
    def waiting(self) -> list[str]:
        return [name for name, task in self.tasks.items() if not task.done()]

    async def ask(self, *names: str, model: str = "") -> None:
        """Each name asks, in order; those beginning with s are submits."""
        for name in names:
            self.tasks[name] = asyncio.get_running_loop().create_task(self._ask(name, model))
            await settle()

    async def _ask(self, name: str, model: str) -> None:
        submit = name.startswith("s")
        self.permits[name] = await self.limiter.acquire(model if submit else None)
        self.admitted.append(name)
        self.times.append(self.clock.now())

    async def release(self, *names: str) -> None:
        """Those that have permits give them back."""
        for name in names:
            self.permits.pop(name).release()
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
        await settle()

    async def stop(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        self.limiter.close()
        await settle()


MakeRequests = Callable[..., Requests]


@pytest.fixture
async def limited() -> AsyncIterator[MakeRequests]:
    """Makes a limiter of so many permits, and what asks it for them."""
    made: list[Requests] = []

    def make(permits: int = 16, *, rate: float | None = None, start: float = START) -> Requests:
        clock = HandClock(start)
        made.append(Requests(Limiter(clock, permits=permits, rate=rate), clock))
        return made[-1]

    yield make
    for requests in made:
        await requests.stop()


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
    return kind("slow down", status=status, code=code, retry_after=retry_after, from_api=True)


# -- permits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("permits", "submits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (16, 14), (100, 98)]
)
async def test_permits_kept_for_reads(limited: MakeRequests, permits: int, submits: int) -> None:
    """Submits get all permits but two, all but one of two or three; reads can get them all."""
    requests = limited(permits)
    await requests.ask(*names("s", permits + 3))
    assert requests.admitted == names("s", submits)
    await requests.ask(*names("r", permits + 3))
    assert requests.admitted[submits:] == names("r", permits - submits)
    reads = limited(permits)
    await reads.ask(*names("r", permits + 3))
    assert reads.admitted == names("r", permits)
    assert len(reads.waiting) == 3


async def test_a_released_permit_goes_to_the_first_in_line(limited: MakeRequests) -> None:
    """Waiters of both kinds are served in the order they came."""
    requests = limited(4)
    await requests.ask("r0", "r1", "r2", "r3", "s4", "r5", "s6", "r7")
    assert requests.admitted == ["r0", "r1", "r2", "r3"]
    for out, served in [("r0", "s4"), ("r1", "r5"), ("r2", "s6"), ("r3", "r7")]:
        await requests.release(out)
        assert requests.admitted[-1] == served


async def test_reads_pass_submits_that_have_no_permit(limited: MakeRequests) -> None:
    """A burst of submits does not hold reads up, and keeps its own order."""
    requests = limited(4)
    await requests.ask("s0", "s1", "s2", "s3", "r0", "r1", "r2")
    assert requests.admitted == ["s0", "s1", "r0", "r1"]
    await requests.release("r0")
    assert requests.admitted[-1] == "r2"
    await requests.release("s0", "s1")
    assert requests.admitted[-2:] == ["s2", "s3"]


async def test_nobody_overtakes_a_waiter_whose_time_has_come(limited: MakeRequests) -> None:
    """A read that arrives as a cool-down ends queues behind the submit that waited for it."""
    requests = limited(4)
    requests.limiter.cool_down(throttle(10), sent_at=START)
    await requests.ask("s0")
    requests.clock.time += 10  # the timer has not fired yet
    await requests.ask("r0")
    await requests.clock.advance(0)
    assert requests.admitted == ["s0"]


async def test_a_cancelled_waiter_leaves_no_trace(limited: MakeRequests) -> None:
    """Cancelled in the queue, in the middle of it too, it takes no permit and blocks nobody."""
    requests = limited(2)
    await requests.ask("r0", "r1", "r2", "r3", "r4")
    assert requests.waiting == ["r2", "r3", "r4"]
    await requests.cancel("r3", "r2")
    await requests.release("r0")
    assert requests.admitted == ["r0", "r1", "r4"]
    await requests.release("r1")
    await requests.ask("r5")
    assert requests.admitted[-1] == "r5"


async def test_a_waiter_cancelled_as_it_gets_its_permit_gives_it_back(
    limited: MakeRequests,
) -> None:
    """Cancelled after it was given a permit and before it could run, it passes it on."""
    requests = limited(1)
    await requests.ask("r0", "r1", "r2")
    requests.permits["r0"].release()  # r1 has the permit now but has not run
    requests.tasks["r1"].cancel()
    await settle()
    assert requests.admitted == ["r0", "r2"]
    await requests.release("r2")
    await requests.ask("r3")
    assert requests.admitted[-1] == "r3"


@examples(150)
@given(
    permits=st.integers(1, 6),
    moves=st.lists(st.tuples(st.sampled_from("rsxl"), st.integers(0, 9)), max_size=40),
)
def test_permits_are_never_lost_or_doubled(*, permits: int, moves: list[tuple[str, int]]) -> None:
    """After any asking, releasing and cancelling, all permits can be had, and never more."""

    async def play() -> None:
        requests = Requests(Limiter(HandClock(), permits=permits), HandClock())
        for k, (move, which) in enumerate(moves):
            held = list(requests.permits)
            if move in "rs":
                await requests.ask(f"{move}{k}")
            elif move == "x":
                await requests.cancel(*requests.waiting[which : which + 1])
            elif held:
                await requests.release(held[which % len(held)])
            assert len(requests.permits) <= permits
        await requests.cancel(*requests.tasks)
        await requests.release(*tuple(requests.permits))
        after = Requests(requests.limiter, requests.clock)
        await after.ask(*names("r", permits + 1))
        assert after.admitted == names("r", permits)
        await after.stop()

    asyncio.run(play())


# -- cool-down ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_a_cool_down_holds_everybody_back(limited: MakeRequests, status: int) -> None:
    """One 429 or 503 holds reads and submits back for as long as Retry-After says."""
    requests = limited()
    requests.limiter.cool_down(throttle(30, status=status), sent_at=START)
    assert requests.limiter.cooling_down == 30
    await requests.ask("r0", "s0")
    await requests.clock.advance(29.9)
    assert requests.admitted == []
    await requests.clock.advance(0.1)
    assert requests.admitted == ["r0"]
    assert requests.limiter.cool_downs == 1


async def test_there_is_no_cool_down_at_first(limited: MakeRequests) -> None:
    """No cool-down ends in the future before there has been one, whatever the clock says."""
    requests = limited(start=-500.0)
    assert requests.limiter.cooling_down == 0
    assert requests.limiter.ready_at() < requests.clock.now()
    await requests.ask("s0")
    assert requests.admitted == ["s0"]


async def test_retry_after_is_capped(limited: MakeRequests) -> None:
    """The session waits at most 300 s, however long it is asked to."""
    requests = limited()
    requests.limiter.cool_down(throttle(86400), sent_at=START)
    assert requests.limiter.cooling_down == 300


async def test_a_cool_down_is_a_little_late(
    limited: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jitter of at most a tenth is added, never taken off."""
    monkeypatch.setattr("random.uniform", lambda _, high: high)
    requests = limited()
    requests.limiter.cool_down(throttle(30), sent_at=START)
    assert requests.limiter.cooling_down == pytest.approx(33)
    capped = limited()
    capped.limiter.cool_down(throttle(9999), sent_at=START)
    assert capped.limiter.cooling_down == pytest.approx(330)


@pytest.mark.parametrize("retry_after", [None, 0.0])
async def test_without_seconds_cool_downs_grow(
    limited: MakeRequests, retry_after: float | None
) -> None:
    """1, 2, 4 ... 60 s in a row; a success starts over. "At once" counts as no number."""
    requests = limited()
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        requests.limiter.cool_down(throttle(retry_after), sent_at=requests.clock.now())
        assert requests.limiter.cooling_down == seconds
        await requests.clock.advance(seconds)
    requests.limiter.succeeded(sent_at=requests.clock.now())
    requests.limiter.cool_down(throttle(retry_after), sent_at=requests.clock.now())
    assert requests.limiter.cooling_down == 1


async def test_one_burst_is_one_cool_down(
    limited: MakeRequests, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixteen refusals of requests that were in flight together neither add up nor repeat."""
    requests = limited()
    with caplog.at_level(logging.WARNING):
        for k in range(16):
            requests.limiter.cool_down(throttle(), sent_at=START - k)
    assert requests.limiter.cooling_down == 1
    assert requests.limiter.cool_downs == 1
    assert len(caplog.records) == 1


async def test_a_longer_retry_after_of_the_same_burst_counts(limited: MakeRequests) -> None:
    """Every Retry-After is obeyed, also of an answer to an older request; none shortens."""
    requests = limited()
    for seconds, end in [(5, 5), (20, 20), (10, 20)]:
        requests.limiter.cool_down(throttle(seconds), sent_at=START - 1)
        assert requests.limiter.cooling_down == end
    assert requests.limiter.cool_downs == 1


async def test_a_cool_down_while_waiting_for_one_is_waited_for(limited: MakeRequests) -> None:
    """A waiter of a cool-down waits for its extension too."""
    requests = limited()
    requests.limiter.cool_down(throttle(10), sent_at=START)
    await requests.ask("r0")
    await requests.clock.advance(5)
    requests.limiter.cool_down(throttle(10), sent_at=START)
    await requests.clock.advance(9.9)
    assert requests.admitted == []
    await requests.clock.advance(0.1)
    assert requests.admitted == ["r0"]


# -- slow start --------------------------------------------------------------------------------


async def test_after_a_cool_down_requests_start_slowly(limited: MakeRequests) -> None:
    """One request first; each success admits one more, until all permits are used."""
    requests = limited(4)
    requests.limiter.cool_down(throttle(10), sent_at=START)
    await requests.ask(*names("r", 12))
    await requests.clock.advance(10)
    assert requests.admitted == ["r0"]
    for released, in_air in enumerate((2, 3, 4, 4)):
        before = len(requests.admitted)
        requests.limiter.succeeded(sent_at=requests.clock.now())
        await settle()
        assert len(requests.admitted) == before + (released < 3)
        await requests.release(f"r{released}")
        assert len(requests.permits) == in_air


async def test_a_cool_down_too_short_to_tell_ends_all_the_same(limited: MakeRequests) -> None:
    """Whoever comes after it is told from those before, also by a clock of large numbers."""
    requests = limited(4, start=1757156493.0)
    requests.limiter.cool_down(throttle(1e-8), sent_at=requests.clock.now())
    await requests.ask("r0")
    await requests.clock.advance(0.01)
    requests.limiter.succeeded(sent_at=requests.times[0])
    await requests.release("r0")
    requests.limiter.cool_down(throttle(1e-8), sent_at=requests.clock.now())
    await requests.ask("r1")
    await requests.clock.advance(0.01)
    await requests.release("r1")
    await requests.ask("r2")
    assert requests.admitted == ["r0", "r1", "r2"]


async def test_what_hangs_since_before_a_cool_down_does_not_slow_the_start(
    limited: MakeRequests,
) -> None:
    """The slow start counts what was sent after the cool-down; permits count everything."""
    requests = limited(8)
    await requests.ask(*names("r", 4))
    requests.limiter.cool_down(throttle(1), sent_at=START)
    await requests.ask(*names("r1", 8))
    await requests.clock.advance(1)
    assert requests.admitted[4:] == ["r10"]
    now = requests.clock.now()
    for released, admitted in (("r10", 7), ("r11", 9)):
        requests.limiter.succeeded(sent_at=now)
        await requests.release(released)
        assert len(requests.admitted) == admitted
    await requests.release("r0")  # one of those that hung; the window has no room for another
    assert len(requests.admitted) == 9
    for _ in range(8):
        requests.limiter.succeeded(sent_at=now)
    await settle()
    assert len(requests.admitted) == 9 + 2  # three hang and three are from after it: two are free


async def test_a_refusal_during_the_slow_start_starts_it_over(limited: MakeRequests) -> None:
    """The next cool-down lets one at a time through again."""
    requests = limited(4)
    for _ in range(2):
        requests.limiter.cool_down(throttle(10), sent_at=requests.clock.now())
        requests.admitted.clear()
        await requests.ask(*names("r", 3))
        await requests.clock.advance(10)
        assert len(requests.admitted) == 1
        await requests.cancel(*requests.tasks)
        await requests.release(*tuple(requests.permits))
        requests.limiter.succeeded(sent_at=requests.clock.now())


async def test_old_successes_do_not_widen(limited: MakeRequests) -> None:
    """An answer to a request from before the cool-down says nothing about after it."""
    requests = limited(4)
    requests.limiter.cool_down(throttle(10), sent_at=START)
    for sent_at in (START - 5, START):
        requests.limiter.succeeded(sent_at=sent_at)
    await requests.ask(*names("r", 3))
    await requests.clock.advance(10)
    assert requests.admitted == ["r0"]
    requests.limiter.cool_down(throttle(), sent_at=requests.clock.now())
    assert requests.limiter.cooling_down == 1


# -- one model ---------------------------------------------------------------------------------

NO_CHANNEL = "no_available_channel"


async def test_no_channel_holds_back_that_models_submits_only(limited: MakeRequests) -> None:
    """Other models' submits and all reads go on; that model's wait until the time is over."""
    requests = limited()
    requests.limiter.cool_down(
        throttle(10, status=503, code=NO_CHANNEL), sent_at=START, model="busy"
    )
    await requests.ask("s0", model="busy")
    await requests.ask("s1", model="other")
    await requests.ask("r0", model="busy")
    assert requests.admitted == ["s1", "r0"]
    assert requests.limiter.cooling_down == 0
    assert requests.limiter.cool_downs == 0
    await requests.clock.advance(10)
    assert requests.admitted[-1] == "s0"
    requests.limiter.succeeded(sent_at=requests.clock.now(), model="busy")
    await requests.ask("s2", model="busy")
    assert requests.admitted[-1] == "s2"


async def test_a_model_comes_back_slowly(limited: MakeRequests) -> None:
    """One submit tries it, each success admits one more; other models go on meanwhile."""
    requests = limited()
    limiter = requests.limiter
    await requests.ask("s0", model="busy")
    limiter.cool_down(throttle(10, code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.ask(*names("s1", 8), model="busy")
    await requests.clock.advance(10)
    assert requests.admitted == ["s0", "s10"]
    await requests.release("s0")  # which is from before
    await requests.clock.advance(1)
    await requests.ask("s2", model="other")
    assert requests.admitted == ["s0", "s10", "s2"]
    now = requests.clock.now()
    limiter.cool_down(throttle(10, code=NO_CHANNEL), sent_at=now, model="busy")
    await requests.release("s10")
    await requests.clock.advance(9)
    assert len(requests.admitted) == 3
    await requests.clock.advance(1)
    for released in (1, 2, 3, 4):
        assert len(requests.admitted) == 2 + 2 * released
        limiter.succeeded(sent_at=requests.clock.now(), model="busy")
        await requests.release(f"s1{released}")


async def test_no_channel_without_a_model_cools_the_session(limited: MakeRequests) -> None:
    """Where nobody knows the model, it is an answer like any other 503."""
    requests = limited()
    requests.limiter.cool_down(throttle(10, status=503, code=NO_CHANNEL), sent_at=START)
    assert requests.limiter.cooling_down == 10


async def test_a_burst_without_a_channel_is_one_hold(limited: MakeRequests) -> None:
    """Fourteen refusals that were in flight together hold the model for 1 s, not for 60."""
    requests = limited()
    for _ in range(14):
        requests.limiter.cool_down(throttle(code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.ask("s0", model="busy")
    await requests.clock.advance(1)
    assert requests.admitted == ["s0"]
    requests.limiter.cool_down(throttle(), sent_at=START + 1)
    assert requests.limiter.cooling_down == 1  # the session's own first


async def test_holds_of_a_model_grow_until_it_succeeds(limited: MakeRequests) -> None:
    """1, 2, 4 s in a row for that model; its success starts over, other successes do not."""
    requests = limited()
    for k, seconds in enumerate((1, 2, 4)):
        now = requests.clock.now()
        requests.limiter.cool_down(throttle(code=NO_CHANNEL), sent_at=now, model="busy")
        await requests.ask(f"s{k}", model="busy")
        await requests.clock.advance(seconds - 0.1)
        assert len(requests.admitted) == k
        await requests.clock.advance(0.1)
        assert len(requests.admitted) == k + 1
        requests.limiter.succeeded(sent_at=requests.clock.now(), model="other")
        requests.limiter.succeeded(sent_at=now, model="busy")  # sent before the cool-down
    requests.limiter.succeeded(sent_at=requests.clock.now(), model="busy")
    requests.limiter.cool_down(
        throttle(code=NO_CHANNEL), sent_at=requests.clock.now(), model="busy"
    )
    await requests.ask("s9", model="busy")
    await requests.clock.advance(1)
    assert requests.admitted[-1] == "s9"


async def test_a_submit_already_queued_is_held_too(limited: MakeRequests) -> None:
    """A submit that waited for a permit before the refusal waits for the model as well."""
    requests = limited(1)
    await requests.ask("s0", "s1", model="busy")
    await requests.ask("r0")
    requests.limiter.cool_down(throttle(10, code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.release("s0")
    assert requests.admitted == ["s0", "r0"]
    await requests.release("r0")
    await requests.clock.advance(10)
    assert requests.admitted == ["s0", "r0", "s1"]


async def test_a_hold_that_grows_is_waited_for(limited: MakeRequests) -> None:
    """A waiter of a model waits for its extension too, and can be cancelled."""
    requests = limited()
    requests.limiter.cool_down(throttle(10, code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.ask("s0", "s1", model="busy")
    requests.limiter.cool_down(throttle(20, code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.clock.advance(15)
    assert requests.admitted == []
    await requests.cancel("s0")
    await requests.clock.advance(5)
    assert requests.admitted == ["s1"]


async def test_the_timer_is_set_for_the_earliest(limited: MakeRequests) -> None:
    """A submit that waits long for its model does not make others wait for their token."""
    requests = limited(rate=1)
    requests.limiter.cool_down(throttle(100, code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.ask("s0", model="busy")
    await requests.ask("r0", "r1", "r2")
    await requests.clock.advance(2)
    assert (requests.admitted, requests.times) == (
        ["r0", "r1", "r2"],
        [START, START + 1, START + 2],
    )
    await requests.clock.advance(98)
    assert requests.admitted[-1] == "s0"


async def test_a_timer_that_was_replaced_leaves_the_new_one_alone(limited: MakeRequests) -> None:
    """Closing stops the timer for the earliest, too: nothing of the limiter runs on."""
    requests = limited(rate=1)
    requests.limiter.cool_down(throttle(100, code=NO_CHANNEL), sent_at=START, model="busy")
    await requests.ask("s0", model="busy")
    await requests.ask("r0", "r1")
    await requests.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# -- rate --------------------------------------------------------------------------------------


async def test_the_rate_is_kept(limited: MakeRequests) -> None:
    """One request at once, then one each 1/rate seconds, on the clock."""
    requests = limited(100, rate=4)
    await requests.ask(*names("r", 10))
    assert requests.admitted == names("r", 1)
    await requests.clock.advance(10)
    assert requests.times == [START + k / 4 for k in range(10)]
    assert requests.admitted == names("r", 10)


async def test_a_rate_below_one(limited: MakeRequests) -> None:
    """A request each four seconds is a rate too."""
    requests = limited(rate=0.25)
    await requests.ask("r0", "s1", "r2")
    await requests.clock.advance(8)
    assert requests.admitted == ["r0", "s1", "r2"]
    assert requests.times == [START, START + 4, START + 8]


async def test_idle_time_is_not_saved_up(limited: MakeRequests) -> None:
    """An hour of silence earns one request, not a bunch."""
    requests = limited(100, rate=5)
    await requests.clock.advance(3600)
    await requests.ask(*names("r", 20))
    assert len(requests.admitted) == 1


async def test_a_permit_given_back_costs_no_token(limited: MakeRequests) -> None:
    """A waiter cancelled as it gets its permit has not used up the rate."""
    requests = limited(1, rate=2)
    await requests.ask("r0", "r1", "r2")
    await requests.clock.advance(0.5)
    requests.permits["r0"].release()
    requests.tasks["r1"].cancel()
    await settle()
    assert requests.admitted == ["r0", "r2"]
    assert requests.times == [START, START + 0.5]


async def test_rate_and_cool_down_together(limited: MakeRequests) -> None:
    """A waiter of the rate waits for a cool-down as well."""
    requests = limited(rate=1)
    await requests.ask("r0", "r1")
    requests.limiter.cool_down(throttle(30), sent_at=START)
    await requests.release("r0")
    await requests.clock.advance(29)
    assert requests.admitted == ["r0"]
    await requests.clock.advance(1)
    assert requests.admitted == ["r0", "r1"]


@pytest.mark.parametrize("rate", [0.3, 3, 7, 1e5])
async def test_no_rate_stalls_or_spins(limited: MakeRequests, rate: float) -> None:
    """Rates that binary fractions cannot say still let everybody in, in order."""
    requests = limited(100, rate=rate, start=1e7 + 1 / 3)
    await requests.ask(*names("r", 30))
    await requests.clock.advance(31 / rate + 1)
    assert requests.admitted == names("r", 30)


# -- the end -----------------------------------------------------------------------------------


async def test_closing_leaves_nothing_running(limited: MakeRequests) -> None:
    """The timer does not outlive the limiter; closing twice is closing once."""
    requests = limited()
    requests.limiter.cool_down(throttle(10), sent_at=START)
    await requests.ask("r0")
    assert len(asyncio.all_tasks()) == 3  # this test, the waiter, the timer
    await requests.cancel("r0")
    requests.limiter.close()
    requests.limiter.close()
    await settle()
    assert len(asyncio.all_tasks()) == 1


# -- taking turns ------------------------------------------------------------------


async def test_reads_and_submits_take_turns_at_a_rate(limited: MakeRequests) -> None:
    """However many submits wait for their tokens, every second one is a read's if one waits."""
    requests = limited(16, rate=1.0)
    await requests.ask(*names("s", 6))
    alone = requests.limiter.is_contended()
    await requests.ask("r0")
    assert (alone, requests.limiter.is_contended()) == (True, False)
    await requests.clock.advance(1)
    await requests.ask("r1")
    await requests.clock.advance(4)
    assert requests.admitted == ["s0", "r0", "s1", "r1", "s2", "s3"]


async def test_without_a_rate_nobody_has_to_queue(limited: MakeRequests) -> None:
    """Reads have permits of their own there."""
    requests = limited(4)
    await requests.ask(*names("s", 6))
    assert not requests.limiter.is_contended()


@define
class TickingClock:
    """Time passes whenever it is read."""

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
    limiter = Limiter(clock, permits=4, rate=100)
    (await limiter.acquire()).release()
    clock.time += 0.01 - early
    waiting = asyncio.create_task(limiter.acquire())
    await settle()
    assert waiting.done()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks run eagerly since Python 3.12")
@pytest.mark.parametrize("early", [step * 0.0005 for step in range(1, 20)])
async def test_a_token_that_comes_while_tasks_run_eagerly(early: float) -> None:
    """Also where every other task runs at once, nobody waits for good."""
    loop = asyncio.get_running_loop()
    clock = TickingClock(tick=0.001)
    limiter = Limiter(clock, permits=4, rate=100)
    (await limiter.acquire()).release()
    clock.time += 0.01 - early
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - not in 3.11
    try:
        waiting = asyncio.create_task(limiter.acquire())
        await settle()
        assert waiting.done()
    finally:
        loop.set_task_factory(None)


async def test_the_timer_is_the_limiters_own() -> None:
    """A task factory that refuses, or somebody who cancels all tasks, leaves nobody waiting."""
    clock = HandClock()
    limiter = Limiter(clock, permits=4, rate=1)
    await limiter.acquire()
    loop = asyncio.get_running_loop()
    waiting = [asyncio.create_task(limiter.acquire()) for _ in range(2)]
    loop.set_task_factory(lambda *_, **__: pytest.fail("asked for a task"))
    try:
        await settle()
        timer = limiter._timer._sleeper
        assert timer is not None
        timer.cancel()  # while it sleeps
        for _ in range(2):
            await asyncio.sleep(0)
        replaced = limiter._timer._sleeper
        assert replaced is not None
        assert replaced is not timer
        replaced.cancel()  # before its first step
        await clock.advance(1)
        assert [task.done() for task in waiting] == [True, False]
        assert limiter._timer._sleeper is not None
        limiter._timer._sleeper.cancel()
        await clock.advance(1)
        assert waiting[1].done()
    finally:
        loop.set_task_factory(None)


async def test_a_clock_that_cannot_sleep_fails_the_waiters() -> None:
    """Nobody waits for good for a token that nobody can wait for."""

    class Sleepless(HandClock):
        async def sleep_until(self, when: float) -> None:
            raise OSError(f"no sleep until {when}")

    limiter = Limiter(Sleepless(), permits=4, rate=1)
    await limiter.acquire()
    for _ in range(2):
        with pytest.raises(OSError, match="no sleep"):
            await limiter.acquire("a model")
