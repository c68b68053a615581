"""The circuit breaker of the batch endpoint, step by step."""

from __future__ import annotations

import pytest

from evolink_async import (
    EvolinkError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ServerError,
)
from evolink_async._http.breaker import BatchBreaker, State
from evolink_async.emulator import ManualClock

DOWN = ServerError("down", status=500, from_api=True)
THROTTLE = RateLimitError("too fast", status=429, from_api=True)
REFUSAL = InvalidRequestError("no", status=400, from_api=True)
ABSENT = NotFoundError("no such path", status=404, from_api=True)
LOST = NotFoundError("<html>", status=404, from_api=False, retryable=True)


@pytest.fixture
def breaker(clock: ManualClock) -> BatchBreaker:
    return BatchBreaker(clock)


def read(breaker: BatchBreaker, clock: ManualClock, failure: EvolinkError | None = None) -> bool:
    """One read of several tasks, start to end; True if it was a probe."""
    probe = breaker.begin(single=False)
    if failure is not None:
        breaker.refuses(failure)
    # Sent a little later than what was answered before.
    breaker.record(failure, sent_at=clock.now() + 0.01, probe=probe)
    if probe:
        breaker.test_ended()
    return probe


def read_singly(
    breaker: BatchBreaker, clock: ManualClock, failure: EvolinkError | None = None
) -> bool:
    """One single read, start to end; True if it was a test."""
    test = breaker.begin(single=True)
    breaker.record_single(failure, sent_at=clock.now())
    if test:
        breaker.test_ended()
    return test


async def open_for(breaker: BatchBreaker, clock: ManualClock) -> float:
    """Seconds until batch reads are allowed again, while single reads work."""
    start = clock.now()
    while not breaker.allows_batch():
        assert clock.now() - start < 1000
        read_singly(breaker, clock)
        await clock.sleep_until(clock.now() + 1)
    return clock.now() - start


def fail_alone(breaker: BatchBreaker, clock: ManualClock, failure: EvolinkError = DOWN) -> None:
    """Three failures, a single read that works, and one more."""
    for _ in range(3):
        assert breaker.allows_batch()
        read(breaker, clock, failure)
    assert not breaker.allows_batch()
    assert read_singly(breaker, clock)
    assert breaker.allows_batch()
    read(breaker, clock, failure)
    assert not breaker.allows_batch()


async def test_one_probe_at_a_time_after_open_times_that_double(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """30 s, a minute, two, four, then five for good; one that works ends it."""
    fail_alone(breaker, clock)
    for seconds in (30, 60, 120, 240, 300, 300):
        assert breaker.state.name == "OPEN"
        assert await open_for(breaker, clock) == seconds
        assert breaker.state.name == "HALF_OPEN"
        assert breaker.begin(single=False)
        assert not breaker.allows_batch()
        breaker.record(DOWN, sent_at=clock.now(), probe=True)
        breaker.test_ended()
    await open_for(breaker, clock)
    assert read(breaker, clock)
    assert breaker.allows_batch()
    assert breaker.state is State.CLOSED
    assert not read(breaker, clock, DOWN)


async def test_probes_begun_together_are_one(breaker: BatchBreaker, clock: ManualClock) -> None:
    """What fails with another probe, or after one has worked, says nothing more."""
    fail_alone(breaker, clock)
    await open_for(breaker, clock)
    for _ in range(5):
        breaker.record(DOWN, sent_at=clock.now(), probe=True)
    assert await open_for(breaker, clock) == 60
    read(breaker, clock)
    breaker.record(DOWN, sent_at=clock.now(), probe=True)
    assert breaker.allows_batch()


async def test_a_throttled_probe_comes_again(breaker: BatchBreaker, clock: ManualClock) -> None:
    """A 429 says that nothing was found out: it stays open for as long again."""
    fail_alone(breaker, clock)
    for _ in range(4):
        assert await open_for(breaker, clock) == 30
        read(breaker, clock, THROTTLE)


async def test_one_throttle_of_batch_reads_alone_may_be_chance(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """Only twice in a row a single read that works and a batch read that is throttled open it."""
    for _ in range(3):
        for _ in range(3):
            read(breaker, clock, THROTTLE)
        assert read_singly(breaker, clock)
        read(breaker, clock, THROTTLE)
        assert breaker.state is State.CLOSED
        assert read_singly(breaker, clock)
        read(breaker, clock)
        assert breaker.allows_batch()
    for _ in range(3):
        read(breaker, clock, THROTTLE)
    for _ in range(2):
        assert breaker.state is State.CLOSED
        assert read_singly(breaker, clock)
        read(breaker, clock, THROTTLE)
    assert breaker.state is State.OPEN
    assert await open_for(breaker, clock) == 30


async def test_a_throttle_right_beside_the_single_read_says_nothing(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """The single read may have taken what the limit allows; another failure counts."""
    for failure, state in ((THROTTLE, State.CLOSED), (DOWN, State.OPEN)):
        for _ in range(3):
            read(breaker, clock, failure)
        assert breaker.begin(single=True)
        assert not breaker.begin(single=False)
        breaker.record_single(None, sent_at=clock.now())
        breaker.test_ended()
        breaker.record(failure, sent_at=clock.now(), probe=False)
        assert breaker.state is state
        if state is State.CLOSED:
            read(breaker, clock)


async def test_batch_reads_that_waited_are_not_sent_once_it_stops(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """Each time batch reads stop is counted, once: while a test is in flight others begin."""
    seen = [breaker.stops]
    for _ in range(4):
        read(breaker, clock, DOWN)
        seen.append(breaker.stops)
    read_singly(breaker, clock)
    read(breaker, clock, DOWN)
    assert breaker.state is State.OPEN
    seen.append(breaker.stops)
    assert seen == [0, 0, 0, 1, 1, 2]


async def test_a_long_throttle_is_told_apart_at_once(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """Each try may hold everybody back so long: one single read decides, and it opens longer."""
    long = RateLimitError("too fast", status=429, from_api=True, retry_after=20.0)
    read(breaker, clock, long)
    assert read_singly(breaker, clock)
    read(breaker, clock)  # all were limited, and are no more
    assert not breaker.begin(single=True)
    read(breaker, clock, long)
    assert read_singly(breaker, clock)
    read(breaker, clock, long)
    assert breaker.state is State.OPEN
    await clock.sleep_until(clock.now() + 20)  # the cool-down of everybody
    assert await open_for(breaker, clock) == 200


async def test_a_retry_after_that_holds_nobody_back_opens_no_longer(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """What is no throttle cools nobody down, whatever its ``Retry-After``."""
    fail_alone(breaker, clock, ServerError("down", status=500, from_api=True, retry_after=300.0))
    assert await open_for(breaker, clock) == 30


async def test_open_times_count_from_the_first_single_read(
    breaker: BatchBreaker, clock: ManualClock
) -> None:
    """A cool-down as long as the open time lets nothing but probes through otherwise."""
    fail_alone(breaker, clock)
    await clock.sleep_until(clock.now() + 60)
    assert breaker.state is State.OPEN
    assert await open_for(breaker, clock) == 30
    read(breaker, clock, THROTTLE)
    await clock.sleep_until(clock.now() + 60)
    assert await open_for(breaker, clock) == 30


async def test_one_single_read_is_a_test(breaker: BatchBreaker, clock: ManualClock) -> None:
    """While it is in flight the others are read together as before."""
    for _ in range(3):
        read(breaker, clock, DOWN)
    assert not breaker.allows_batch()
    assert breaker.begin(single=True)
    assert breaker.allows_batch()
    breaker.test_ended()
    assert not breaker.allows_batch()


async def test_a_probe_that_is_cancelled_is_over(breaker: BatchBreaker, clock: ManualClock) -> None:
    """Nothing was found out, and the next one is a probe again."""
    fail_alone(breaker, clock)
    await open_for(breaker, clock)
    assert breaker.begin(single=False)
    breaker.test_ended()
    assert breaker.allows_batch()
    assert breaker.begin(single=False)


@pytest.mark.parametrize(
    ("known", "failure", "after"),
    [
        (False, ABSENT, 1),
        (True, ABSENT, 1),
        (False, LOST, 1),
        (True, LOST, None),
        (False, REFUSAL, 1),
        (True, REFUSAL, 3),
    ],
)
async def test_refusals(
    breaker: BatchBreaker,
    clock: ManualClock,
    *,
    known: bool,
    failure: EvolinkError,
    after: int | None,
) -> None:
    """One is enough of an endpoint that never worked; where it has, only the API's own 404 is."""
    if known:
        read(breaker, clock)
    said = [breaker.refuses(failure) for _ in range(4)]
    assert (said.index(True) + 1 if True in said else None) == after
