"""Trying again: the policy, the budget that keeps an outage from becoming a storm, the loop.

The only module that runs tenacity's retry loop; no tenacity type leaves it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar, cast

from attrs import define, field, frozen
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_exponential,
    wait_random,
)
from tenacity.wait import wait_base

from evolink_async._checks import number, valid
from evolink_async._clock import Clock, sleep
from evolink_async.errors import APITimeoutError, EvolinkError

__all__ = ["MAX_RETRY_AFTER", "Retries", "RetryBudget", "RetryPolicy", "Timeout"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_RETRY_AFTER: Final = 300.0
"""Seconds: the longest ``Retry-After`` a session obeys; a submit asked to wait longer fails."""


def _from(least: float) -> Callable[[object, Any, object], None]:
    return valid(number, least=least, most=1e12)


_SECONDS: Final = valid(number, above=True, unit="seconds, a number")


@frozen(kw_only=True)
class RetryPolicy:
    """When and how often a failed exchange is tried again.

    The wait before attempt k+1 is ``min(wait_max, wait_initial * wait_exp_base**(k-1)) +
    uniform(0, wait_jitter)`` seconds. After an answer that asks to wait (429, 503) the whole
    session cools down instead. A submit is only resent if it surely was not accepted.

    Attributes:
        attempts: How often one submit, download or other single call is tried in all.
            Reads of tasks are tried until the task's deadline.
        timeout: Seconds after which no further attempt starts.
        wait_initial: Seconds before the second attempt.
        wait_max: Most seconds between two attempts.
        wait_jitter: Seconds of randomness.
        wait_exp_base: Growth of the wait from attempt to attempt.
        budget: Capacity of the session's retry budget: a retry takes 5 (10 after a
            time-out, none after a 429 or 503), a success gives 1 back; while it is empty
            nothing is retried, and failed reads wait *wait_max*.
        resend_uncertain: True resends a submit of unknown outcome with the same
            idempotency key. The gateway has been observed to answer such a repeat with
            the first response; the API's page does not promise it.
    """

    attempts: int = field(default=8, validator=_from(1))
    timeout: float = field(default=600.0, validator=_from(0))
    wait_initial: float = field(default=0.5, validator=_from(0))
    wait_max: float = field(default=30.0, validator=_from(0))
    wait_jitter: float = field(default=0.5, validator=_from(0))
    wait_exp_base: float = field(default=2.0, validator=_from(1))
    budget: int = field(default=500, validator=_from(0))
    resend_uncertain: bool = False

    def wait_after(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row."""
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # only counts
        state.attempt_number = max(1, failures)
        return self._backoff(state)

    @property
    def _backoff(self) -> wait_base:
        growing = wait_exponential(
            multiplier=self.wait_initial,
            max=self.wait_max if self.wait_initial else 0,  # it returns max on an overflow
            exp_base=self.wait_exp_base,
        )
        return growing + wait_random(0, self.wait_jitter)


@define
class RetryBudget:
    """Tokens that retries take and successes give back, as in the AWS SDKs' standard mode.

    Attributes:
        capacity: How many there are at most.
        level: How many there are now.
        is_spent: True if there were not enough for the last retry.
    """

    capacity: float
    level: float = field(init=False)
    is_spent: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.level = self.capacity

    def covers(self, error: EvolinkError) -> bool:
        """Whether there is enough left for one retry after *error*."""
        return self.level >= _price(error)

    def take(self, error: EvolinkError) -> None:
        """Pay for one retry after *error*, if there is enough left."""
        self.is_spent = not self.covers(error)
        if not self.is_spent:
            self.level -= _price(error)

    def give(self) -> None:
        """One exchange succeeded."""
        self.level = min(self.capacity, self.level + 1)
        self.is_spent = False


def _price(error: EvolinkError) -> int:
    if error.is_throttle:  # what it costs is the cool-down of the whole session
        return 0
    return 10 if isinstance(error, APITimeoutError) else 5


@define
class Retries:
    """Tries the calls of one session again, as its policy and its budget allow.

    Attributes:
        policy: How often, and how soon.
        budget: What retries and failed polls take from.
        count: How many there have been.
    """

    policy: RetryPolicy
    _clock: Clock
    budget: RetryBudget = field(init=False)
    count: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.budget = RetryBudget(self.policy.budget)

    def wait_after(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row, the longest if the budget is spent."""
        return self.policy.wait_max if self.budget.is_spent else self.policy.wait_after(failures)

    async def run(
        self,
        call: Callable[[], Awaitable[T]],
        again: Callable[[EvolinkError], bool],
        *,
        began_at: Callable[[], float] | None = None,
    ) -> T:
        """Await ``call()`` until it succeeds, *again* says no, or the policy ends it.

        The policy's time-out counts from now, or from what *began_at* says after a failure.

        Raises:
            EvolinkError: The last attempt's error, as it was.
        """
        policy, clock, budget = self.policy, self._clock, self.budget
        started = clock.now()
        try:  # nearly all succeed, and tenacity is costly: benchmarks/submit_cost.py
            return await call()
        except EvolinkError as exc:
            failure = exc
        if began_at is not None:
            started = began_at()

        def wanted(error: BaseException) -> bool:
            return isinstance(error, EvolinkError) and again(error)

        def wait(state: RetryCallState) -> float:
            # After a throttle the limiter holds all requests back: waiting here would be twice.
            return 0.0 if _error(state).is_throttle else policy.wait_after(state.attempt_number)

        def stop(state: RetryCallState) -> bool:
            return (
                state.attempt_number >= policy.attempts
                or clock.now() - started + state.upcoming_sleep > policy.timeout
                or not budget.covers(_error(state))
            )

        def before_sleep(state: RetryCallState) -> None:
            # Here it is certain that there will be another attempt, so here it is paid for.
            error = _error(state)
            budget.take(error)
            self.count += 1
            logger.warning("trying again in %.1f s: %s", state.upcoming_sleep, error)

        retrying = AsyncRetrying(
            retry=retry_if_exception(wanted),
            wait=wait,
            stop=stop,
            before_sleep=before_sleep,
            sleep=partial(sleep, clock),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                if attempt.retry_state.attempt_number == 1:  # made above
                    raise failure
                return await call()
        raise failure  # pragma: no cover - the loop ends with a result or an error


def _error(state: RetryCallState) -> EvolinkError:
    """What the last attempt failed with, once it is known that it may be tried again."""
    return cast("EvolinkError", state.outcome and state.outcome.exception())


@frozen(kw_only=True)
class Timeout:
    """How long one HTTP exchange may take, in seconds, counted from when it may start.

    Attributes:
        connect: Making a connection, TLS included. A submit that fails here was never sent.
        submit: A whole submit. Beyond it the outcome is unknown, so be generous.
        read: Anything else, and for a download the longest silence.
    """

    connect: float = field(default=10, validator=_SECONDS)
    submit: float = field(default=60, validator=_SECONDS)
    read: float = field(default=30, validator=_SECONDS)
