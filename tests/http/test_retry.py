"""Trying again: how long to wait, what a retry costs, when to stop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from evolink_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ConfigurationError,
    EvolinkError,
    RateLimitError,
    RetryPolicy,
    ServerError,
    Timeout,
)
from evolink_async._http.retry import MAX_RETRY_AFTER, Retries, RetryBudget

PLAIN = RetryPolicy(wait_jitter=0)
BROKEN = APIConnectionError("broken", sent=True)
THROTTLED = RateLimitError("slow down", status=429)


@define
class SkippingClock:
    """Sleeping takes no time and moves the clock."""

    time: float = 100.0
    slept: list[float] = field(factory=list)

    def now(self) -> float:
        return self.time

    async def sleep_until(self, when: float) -> None:
        self.slept.append(when - self.time)
        self.time = when


@define
class Call:
    """Raises each of *outcomes* in turn, then returns how often it was called."""

    outcomes: Sequence[BaseException]
    takes: float = 0.0
    clock: SkippingClock = field(factory=SkippingClock)
    times: int = 0

    async def __call__(self) -> int:
        self.times += 1
        self.clock.time += self.takes
        if self.times <= len(self.outcomes):
            raise self.outcomes[self.times - 1]
        return self.times


async def tried(
    call: Call,
    policy: RetryPolicy = PLAIN,
    *,
    budget: RetryBudget | None = None,
    again: Callable[[EvolinkError], bool] = lambda _: True,
) -> int:
    retries = Retries(policy, call.clock)
    retries.budget = RetryBudget(500) if budget is None else budget
    return await retries.run(call, again)


# -- the policy --------------------------------------------------------------------------------


def test_defaults() -> None:
    """Eight attempts within ten minutes, half a second growing to half a minute."""
    policy = RetryPolicy()
    assert (policy.attempts, policy.timeout, policy.budget) == (8, 600, 500)
    assert (policy.wait_initial, policy.wait_max, policy.wait_exp_base) == (0.5, 30, 2)
    assert (policy.wait_jitter, policy.resend_uncertain) == (0.5, False)
    assert MAX_RETRY_AFTER == 300


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(0, 0.5), (1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (1025, 30.0), (10**9, 30.0)],
)
def test_waits_grow_to_a_ceiling(failures: int, seconds: float) -> None:
    """Each failure doubles the wait, up to wait_max, after any number of them."""
    assert PLAIN.wait_after(failures) == seconds


def test_waits_are_jittered() -> None:
    """Clients that failed together do not come back together."""
    policy = RetryPolicy(wait_initial=1, wait_jitter=10)
    waits = [policy.wait_after(1) for _ in range(100)]
    assert min(waits) < 4
    assert max(waits) > 8


def test_no_wait_stays_no_wait() -> None:
    """Where the first wait is nothing, so is the thousandth."""
    policy = RetryPolicy(wait_initial=0, wait_jitter=0)
    assert [policy.wait_after(failures) for failures in (1, 5, 2000)] == [0, 0, 0]


@examples(300)
@given(
    failures=st.integers(1, 10**6),
    initial=st.floats(0, 1e6),
    most=st.floats(0, 1e6),
    jitter=st.floats(0, 100),
    base=st.floats(1, 100),
)
def test_waits_stay_within_their_formula(
    *, failures: int, initial: float, most: float, jitter: float, base: float
) -> None:
    """min(wait_max, wait_initial * base**(k-1)) plus at most the jitter, for any setting."""
    policy = RetryPolicy(
        wait_initial=initial, wait_max=most, wait_jitter=jitter, wait_exp_base=base
    )
    try:
        expected = min(most, initial * base ** (failures - 1))
    except OverflowError:
        expected = most if initial else 0
    wait = policy.wait_after(failures)
    assert expected * (1 - 1e-9) <= wait <= expected + jitter + 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("attempts", 0), ("attempts", True), ("attempts", "8"), ("attempts", None)),
        *(("timeout", -1), ("wait_initial", -0.1), ("wait_max", math.nan), ("wait_max", math.inf)),
        *(("wait_jitter", -1), ("wait_exp_base", 0.5), ("budget", -1), ("budget", 10**5000)),
    ],
    ids=range(12),
)
def test_settings_that_are_refused(name: str, value: object) -> None:
    """A setting of another type or range is refused by its name."""
    with pytest.raises(ConfigurationError, match=name):
        RetryPolicy(**{name: value})  # type: ignore[arg-type]  # what is being tested


# -- the budget --------------------------------------------------------------------------------


def test_a_retry_takes_5_and_a_time_out_10() -> None:
    """A retry after a time-out costs twice as much as another."""
    budget = RetryBudget(20)
    late = APITimeoutError("late")
    seen = []
    for error in (BROKEN, late, late, BROKEN, BROKEN, THROTTLED):
        budget.take(error)
        seen.append((budget.level, budget.is_spent))
    assert seen == [(15, False), (5, False), (5, True), (0, False), (0, True), (0, False)]


def test_a_success_gives_1_back() -> None:
    """Successes refill the budget to its capacity and not beyond."""
    budget = RetryBudget(10)
    budget.take(BROKEN)
    for level in (6, 7, 8, 9, 10, 10):
        budget.give()
        assert budget.level == level


# -- the loop ----------------------------------------------------------------------------------


async def test_a_success_is_returned_at_once() -> None:
    """What succeeds is called once, and costs nothing."""
    call, budget = Call([]), RetryBudget(7)
    assert await tried(call, budget=budget) == 1
    assert call.clock.slept == []
    assert budget.level == 7


async def test_failures_are_waited_out(caplog: pytest.LogCaptureFixture) -> None:
    """Between attempts the growing wait passes on the session's clock; each is announced."""
    call = Call([BROKEN, BROKEN, BROKEN])
    assert await tried(call) == 4
    assert call.clock.slept == [0.5, 1.0, 2.0]
    assert caplog.messages == [f"trying again in {wait} s: broken" for wait in (0.5, 1.0, 2.0)]


async def test_the_last_error_is_raised_as_it_was() -> None:
    """After the last attempt its own error comes out, not one about retrying."""
    errors = [APIConnectionError(str(k)) for k in range(3)]
    call = Call(errors)
    with pytest.raises(APIConnectionError) as caught:
        await tried(call, RetryPolicy(attempts=3))
    assert caught.value is errors[2]
    assert call.times == 3


async def test_what_is_not_wanted_again_is_raised() -> None:
    """A failure that is final is not repeated, and pays nothing."""
    call, budget = Call([BROKEN]), RetryBudget(500)
    with pytest.raises(APIConnectionError):
        await tried(call, again=lambda _: False, budget=budget)
    assert (call.times, budget.level) == (1, 500)


@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError(), KeyError("x")])
async def test_errors_that_are_not_ours_pass(error: BaseException) -> None:
    """A bug or a cancellation is never tried again."""
    call = Call([error])
    with pytest.raises(type(error)) as caught:
        await tried(call)
    assert caught.value is error
    assert call.times == 1


async def test_a_throttle_is_waited_out_at_the_limiter() -> None:
    """After a 429 or 503 the next attempt is made at once: the limiter holds it back."""
    call = Call([THROTTLED, BROKEN, ServerError("busy", status=503, is_throttle=True)])
    assert await tried(call) == 4
    assert call.clock.slept == [1.0]


async def test_no_attempt_starts_after_the_time_out() -> None:
    """The wait that would end too late is not begun."""
    call = Call([BROKEN] * 9, takes=4.6)
    with pytest.raises(APIConnectionError):
        await tried(call, RetryPolicy(timeout=10, wait_jitter=0))
    assert call.times == 2
    assert call.clock.slept == [0.5]


async def test_an_empty_budget_stops_retries() -> None:
    """In an outage the session's calls stop repeating themselves together."""
    budget = RetryBudget(12)
    call = Call([BROKEN] * 9)
    with pytest.raises(APIConnectionError):
        await tried(call, budget=budget)
    assert (call.times, budget.level) == (3, 2)
    other = Call([BROKEN])
    with pytest.raises(APIConnectionError):
        await tried(other, budget=budget)
    assert other.times == 1


async def test_the_last_attempt_pays_nothing() -> None:
    """A budget pays for attempts that are made, not for the one that is not."""
    budget = RetryBudget(500)
    with pytest.raises(APIConnectionError):
        await tried(Call([BROKEN] * 9), RetryPolicy(attempts=3), budget=budget)
    assert budget.level == 490


async def test_a_cancelled_wait_ends_the_loop() -> None:
    """Cancelling the caller while it waits makes no further attempt."""

    class StuckClock(SkippingClock):
        async def sleep_until(self, when: float) -> None:
            await asyncio.get_running_loop().create_future()
            await super().sleep_until(when)

    call = Call([BROKEN, BROKEN], clock=StuckClock())
    task = asyncio.ensure_future(_as_coroutine(tried(call)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.times == 1


async def _as_coroutine(awaitable: Awaitable[int]) -> int:
    return await awaitable


async def test_loops_do_not_share_counts() -> None:
    """Two calls at the same time count their attempts each for itself."""
    calls = [Call([BROKEN] * 4), Call([BROKEN] * 4)]
    policy = RetryPolicy(attempts=5)
    assert await asyncio.gather(*(tried(call, policy) for call in calls)) == [5, 5]


async def test_the_error_decides() -> None:
    """The caller's answer to "again?" is asked for each error by itself."""
    server = ServerError("down", status=500)
    call = Call([BROKEN, server, BROKEN])
    with pytest.raises(APIStatusError):
        await tried(call, again=lambda error: isinstance(error, APIConnectionError))
    assert call.times == 2


def test_timeouts_have_defaults() -> None:
    """10 s to connect, 60 s for a submit, 30 s for anything else."""
    assert Timeout() == Timeout(connect=10, submit=60, read=30)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, True, "5", None, 10**400])
@pytest.mark.parametrize("name", ["connect", "submit", "read"])
def test_timeouts_are_seconds_above_zero(name: str, seconds: object) -> None:
    """Anything else is a setting that is refused by its name."""
    with pytest.raises(ConfigurationError, match=name):
        Timeout(**{name: seconds})  # type: ignore[arg-type]  # what is being tested
