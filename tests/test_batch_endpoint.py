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
from evolink_async._batch_endpoint import BatchEndpoint
from evolink_async.emulator import ManualClock

DOWN = ServerError("down", status=500, from_api=True)
THROTTLE = RateLimitError("patience", status=429, from_api=True)
REFUSAL = InvalidRequestError("no", status=400, from_api=True)
ABSENT = NotFoundError("no such path", status=404, from_api=True)
LOST = NotFoundError("<html>", status=404, from_api=False)


@pytest.fixture
def endpoint(clock: ManualClock) -> BatchEndpoint:
    return BatchEndpoint(clock)


def read(endpoint: BatchEndpoint, clock: ManualClock, failure: EvolinkError | None = None) -> bool:
    """One read of several tasks, start to end; True if it was a probe."""
    probe = endpoint.begin()
    if failure is not None:
        endpoint.meaning(failure)
    if probe:
        endpoint.probed()
    endpoint.judge(failure, sent_at=clock.now(), probe=probe)
    return probe


async def left_alone(endpoint: BatchEndpoint, clock: ManualClock) -> float:
    """Seconds until it is used again."""
    start = clock.now()
    while not endpoint.is_usable():
        await clock.sleep_until(clock.now() + 1)
    return clock.now() - start


def fail_alone(endpoint: BatchEndpoint, clock: ManualClock, failure: EvolinkError = DOWN) -> None:
    """Three failures, a single read that works, and one more."""
    for _ in range(3):
        assert endpoint.is_usable()
        read(endpoint, clock, failure)
    assert not endpoint.is_usable()
    endpoint.judge_by_single(None)
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
        assert endpoint.begin()
        assert not endpoint.is_usable()
        endpoint.probed()
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


async def test_throttles_are_not_the_endpoints(endpoint: BatchEndpoint, clock: ManualClock) -> None:
    """Unless reads together get nothing else for half a minute while single ones work."""
    for _ in range(20):
        read(endpoint, clock, THROTTLE)
    assert endpoint.is_usable()
    await clock.sleep_until(clock.now() + 30)
    fail_alone(endpoint, clock, THROTTLE)


async def test_a_probe_that_is_cancelled_is_over(
    endpoint: BatchEndpoint, clock: ManualClock
) -> None:
    """Nothing was found out, and the next one may."""
    fail_alone(endpoint, clock)
    await left_alone(endpoint, clock)
    assert endpoint.begin()
    endpoint.probed()
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
