"""When to poll: the settings, what the watcher asks of a schedule, and plain backoff.

Time is passed in, nothing here reads a clock. Ages are seconds since the submit was sent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from attrs import Attribute, define, field, frozen

from evolink_async._checks import number, refuse, valid

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Backoff", "PollPolicy", "Schedule"]


def _from(least: float, *, optional: bool = False) -> Callable[[object, Any, object], None]:
    return valid(number, least=least, optional=optional)


def _check_wait(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is None:
        return
    allowed = "a tenacity wait strategy that needs only the attempt number, or None"
    try:
        for attempt in (1, 2, 10, 1_000):
            _ask(value, attempt)
    except Exception as error:
        raise refuse(attribute.name, value, allowed, error) from error


def _ask(wait: Any, attempt: int) -> float:
    """Seconds that *wait* answers for a number of polls, without the outcome of any."""
    from tenacity import RetryCallState  # noqa: PLC0415 - only wait= needs it

    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # only counts
    state.attempt_number = attempt
    return float(wait(state))


@frozen(kw_only=True)
class PollPolicy:
    """How a session decides when to poll its running tasks.

    By default it learns how long tasks take and polls where that pays. All times are
    seconds and scale together: for generations ten times as fast, divide all of them by
    ten.

    Attributes:
        price: Seconds of delay that one read is worth. More means fewer reads and later
            results; 0.5 is about five reads and two seconds of delay for a single generation
            of 27 s. Tasks that are polled by one read share its price.
        min_interval: Least time between two polls of one task. Where more tasks run than one
            read can ask for, reads go out in bursts, 2.5 of it apart, unless *wait* is given.
        max_interval: Most time between two polls of one task.
        deadline: Age at which a task is given up, None for never.
        wait: A tenacity wait strategy, for plain backoff instead of learning. It sees the
            number of polls as ``attempt_number`` and nothing else; its answer is kept
            within the two intervals.

    Raises:
        ConfigurationError: A value is not allowed.
    """

    price: float = field(default=0.5, validator=_from(1e-6))
    min_interval: float = field(default=0.25, validator=_from(1e-6))
    max_interval: float = field(default=60.0, validator=_from(1e-6))
    deadline: float | None = field(default=3600.0, validator=_from(1e-6, optional=True))
    wait: Any = field(default=None, validator=_check_wait)

    def __attrs_post_init__(self) -> None:
        if self.max_interval < self.min_interval:
            raise refuse(
                "max_interval", self.max_interval, f"at least min_interval={self.min_interval!r}"
            )

    def clamp(self, age: float, proposed: float) -> float:
        """*proposed* brought into the bounds of a poll after one at *age*; always later."""
        age = 0.0 if math.isnan(age) else age
        # In this order a NaN is replaced by a bound.
        when = min(age + self.max_interval, max(age + self.min_interval, proposed))
        if self.deadline is not None and age < self.deadline < when:
            return self.deadline
        return when if when > age else math.nextafter(age, math.inf)


class Schedule:
    """When to poll tasks of one kind. What their polls show is ignored unless a method learns."""

    __slots__ = ()

    @property
    def typical(self) -> float | None:
        """Learned median duration in seconds, None while nothing was learned."""
        return None

    def next_age(self, age: float, price: float, polls: int = 0) -> float:
        """Age at which to poll next, after *polls* polls, the last one sent at *age*.

        *price* is the seconds of delay that one poll is worth; *age* is 0 after the submit.
        """
        raise NotImplementedError

    def saw_running(self, last_age: float, age: float) -> None:
        """A poll sent at *age* found the task running, the one before was at *last_age*."""

    def saw_end(self, last_age: float, age: float, duration: float | None = None) -> None:
        """A task ended after *last_age* and by *age*, at *duration* if the server gave one."""

    def started(self) -> None:
        """One more task of this kind is being watched."""

    def left(self) -> None:
        """One less, for whatever reason."""


@define(eq=False)
class Backoff(Schedule):
    """The schedule of ``PollPolicy(wait=...)``: it counts polls and learns nothing."""

    policy: PollPolicy

    def next_age(self, age: float, price: float, polls: int = 0) -> float:
        """By the number of polls alone."""
        del price
        return self.policy.clamp(age, age + _ask(self.policy.wait, polls + 1))
