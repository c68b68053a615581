"""The trial of the batch endpoint, step by step."""

from __future__ import annotations

import pytest

from evolink_async import (
    EvolinkError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ServerError,
)
from evolink_async._http.breaker import BatchEndpoint
from evolink_async.emulator import ManualClock

DOWN = ServerError("down", status=500, from_api=True)
THROTTLE = RateLimitError("patience", status=429, from_api=True)
REFUSAL = InvalidRequestError("no", status=400, from_api=True)
ABSENT = NotFoundError("no such path", status=404, from_api=True)
LOST = NotFoundError("<html>", status=404, from_api=False, retryable=True)


@pytest.fixture
def endpoint(clock: ManualClock) -> BatchEndpoint:
    return BatchEndpoint(clock)


def read(endpoint: BatchEndpoint, clock: ManualClock, failure: EvolinkError | None = None) -> bool:
    """One read of several tasks, start to end; True if it was a probe."""
    probe = endpoint.begin(single=False)
    if failure is not None:
        endpoint.meaning(failure)
    if probe:
        endpoint.ended()
    endpoint.judge(failure, sent_at=clock.now(), probe=probe)
    return probe


def read_singly(endpoint: BatchEndpoint, failure: EvolinkError | None = None) -> bool:
    """One single read; True if it was to find something out."""
    trial = endpoint.begin(single=True)
    if trial:
        endpoint.ended()
    endpoint.judge_by_single(failure)
    return trial


async def left_alone(endpoint: BatchEndpoint, clock: ManualClock) -> float:
    """Seconds until it is used again, while single reads work."""
    start = clock.now()
    while not endpoint.is_usable():
        assert clock.now() - start < 1000
        read_singly(endpoint)
        await clock.sleep_until(clock.now() + 1)
    return clock.now() - start


def fail_alone(endpoint: BatchEndpoint, clock: ManualClock, failure: EvolinkError = DOWN) -> None:
    """Three failures, a single read that works, and one more."""
    for _ in range(3):
        assert endpoint.is_usable()
        read(endpoint, clock, failure)
    assert not endpoint.is_usable()
    assert read_singly(endpoint)
    assert endpoint.is_usable()
    read(endpoint, clock, failure)
    assert not endpoint.is_usable()


async def test_a_probe_at_a_time_after_rests_that_double(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """30 s, a minute, two, four, then five for good; one that works ends it."""
    fail_alone(endpoint, clock)
    for rest in (30, 60, 120, 240, 300, 300):
        assert await left_alone(endpoint, clock) == rest
        assert endpoint.on_trial
        assert endpoint.begin(single=False)
        assert not endpoint.is_usable()
        endpoint.ended()
        endpoint.judge(DOWN, sent_at=clock.now(), probe=True)
    await left_alone(endpoint, clock)
    assert read(endpoint, clock)
    assert endpoint.is_usable()
    assert not endpoint.on_trial
    assert not read(endpoint, clock, DOWN)


async def test_probes_begun_together_are_one(endpoint: BatchEndpoint, clock: ManualClock) -> None:
    """What fails with another probe, or after one has worked, says nothing more."""
    fail_alone(endpoint, clock)
    await left_alone(endpoint, clock)
    for _ in range(5):
        endpoint.judge(DOWN, sent_at=clock.now(), probe=True)
    assert await left_alone(endpoint, clock) == 60
    read(endpoint, clock)
    endpoint.judge(DOWN, sent_at=clock.now(), probe=True)
    assert endpoint.is_usable()


async def test_a_throttled_probe_comes_again(endpoint: BatchEndpoint, clock: ManualClock) -> None:
    """A 429 says that nothing was found out: the next rest is as long."""
    fail_alone(endpoint, clock)
    for _ in range(4):
        assert await left_alone(endpoint, clock) == 30
        read(endpoint, clock, THROTTLE)


async def test_throttles_are_rarely_the_endpoints(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """Only if three times in a row a single read works and the next one of several does not."""
    for works in (False, True):
        for _ in range(2 - works):
            for _ in range(0 if endpoint.on_trial else 3):
                read(endpoint, clock, THROTTLE)
            assert read_singly(endpoint)
            read(endpoint, clock, THROTTLE)
            assert not endpoint.is_resting()
        if not works:
            assert read_singly(endpoint)
            read(endpoint, clock)
            assert endpoint.is_usable()
    for _ in range(2):
        assert read_singly(endpoint)
        read(endpoint, clock, THROTTLE)
    assert endpoint.is_resting()
    assert await left_alone(endpoint, clock) == 30


async def test_a_long_throttle_is_told_apart_at_once(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """Each try may cost everybody its patience: one single read decides, and rests are longer."""
    long = RateLimitError("patience", status=429, from_api=True, retry_after=20.0)
    read(endpoint, clock, long)
    assert read_singly(endpoint)
    read(endpoint, clock)  # all were limited, and are no more
    assert not endpoint.on_trial
    read(endpoint, clock, long)
    assert read_singly(endpoint)
    read(endpoint, clock, long)
    assert endpoint.is_resting()
    assert await left_alone(endpoint, clock) == 20 + 200  # when everybody may read again


async def test_patience_that_nobody_has_makes_no_longer_rest(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """What is no throttle cools nobody down, whatever it says of a time to come again."""
    fail_alone(endpoint, clock, ServerError("down", status=500, from_api=True, retry_after=300.0))
    assert await left_alone(endpoint, clock) == 30


async def test_after_a_failed_probe_single_reads_come_first(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """A cool-down as long as the rest lets nothing but probes through otherwise."""
    fail_alone(endpoint, clock)
    await left_alone(endpoint, clock)
    read(endpoint, clock, THROTTLE)
    await clock.sleep_until(clock.now() + 60)
    assert not endpoint.is_usable()
    read_singly(endpoint)
    assert endpoint.is_usable()


async def test_one_single_read_is_a_trial(endpoint: BatchEndpoint, clock: ManualClock) -> None:
    """While it is in the air the others are read together as before."""
    for _ in range(3):
        read(endpoint, clock, DOWN)
    assert endpoint.on_trial
    assert endpoint.begin(single=True)
    assert endpoint.is_usable()
    endpoint.ended()
    assert not endpoint.is_usable()


async def test_a_probe_that_is_cancelled_is_over(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """Nothing was found out, and the next one may."""
    fail_alone(endpoint, clock)
    await left_alone(endpoint, clock)
    assert endpoint.begin(single=False)
    endpoint.ended()
    assert endpoint.is_usable()
    assert endpoint.on_trial


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
    endpoint: BatchEndpoint,
    clock: ManualClock,
    *,
    known: bool,
    failure: EvolinkError,
    after: int | None,
) -> None:
    """One is enough of an endpoint that never worked; where it has, only the API's own 404 is."""
    if known:
        read(endpoint, clock)
    said = [endpoint.meaning(failure) for _ in range(4)]
    assert (said.index(None) + 1 if None in said else None) == after
