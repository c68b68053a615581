"""The circuit breaker of the batch endpoint: whether tasks may be read together now."""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import Final

from attrs import define, field

from evolink_async._clock import Clock
from evolink_async._http.retry import MAX_RETRY_AFTER
from evolink_async.errors import APIStatusError, EvolinkError, InvalidResponseError

__all__ = ["BatchBreaker", "State"]

logger = logging.getLogger(__name__)

_REFUSALS: Final = 3
"""Refused batch reads in a row that open it; the first is enough if none has ever worked."""
_FAILURES: Final = 3
"""Failed batch reads in a row after which a single read shows whether only batch reads fail."""
_THROTTLES: Final = 2
"""429s on batch reads alone, in a row, that open it: any request may meet one by chance."""
_LONG_RETRY_AFTER: Final = 10.0
"""Seconds of ``Retry-After`` from which one failure is enough."""
_OPEN_FIRST: Final = 30.0
"""Seconds it is open at first; twice as long after each probe that fails."""
_OPEN_MOST: Final = 300.0
"""Seconds it is open at most (longer only after a ``Retry-After``), and at once if refused."""
_OPEN_PER_RETRY_AFTER: Final = 10.0
"""It is open for at least so many times the ``Retry-After`` of the failure."""


class State(Enum):
    """Whether tasks are read together."""

    CLOSED = "batch reads are used"
    OPEN = "all reads are single ones"
    HALF_OPEN = "one batch read, the probe, finds out whether they work again"


@define
class BatchBreaker:
    """Opens where batch reads fail and single reads work; an outage of both does not open it.

    ::

        closed --- a 404, 405 or 501 of the API's own ------------------------> open for good
        closed --- refused (3 times, once if it never worked) ----------------> open for 300 s
        closed --- 3 failures, then a single read works, then one more failure -> open for 30 s
        open ----- a single read is answered, and its time passes ------------> half-open
        half-open - the probe works ------------------------------------------> closed
        half-open - the probe fails ------------------------------------------> open twice as long

    For each read, call `begin`; if it is a test, `test_ended` once it is over; and `record` or
    `record_single` with its outcome. A test is a probe or the single read shown above.

    Attributes:
        stops: How often it has stopped batch reads so far. One that waited for its permit
            meanwhile must not be sent.
    """

    _clock: Clock
    stops: int = field(default=0, init=False)
    # When it becomes half-open; how long it was opened for, 0 while it is closed.
    _open_until: float = field(default=-math.inf, init=False)
    _open_for: float = field(default=0.0, init=False)
    # Whether a single read must be answered before the next batch read.
    _needs_single: bool = field(default=False, init=False)
    # Whether a test is in flight: that single read, or the probe.
    _testing: bool = field(default=False, init=False)
    # When that single read was sent and answered, if it worked.
    _single_sent_at: float = field(default=math.inf, init=False)
    _single_worked_at: float = field(default=math.inf, init=False)
    # Batch reads in a row that failed, that were refused, that alone were throttled.
    _failures: int = field(default=0, init=False)
    _refusals: int = field(default=0, init=False)
    _throttles: int = field(default=0, init=False)
    _has_worked: bool = field(default=False, init=False)

    @property
    def state(self) -> State:
        """The state now."""
        if self._open_for == 0:
            return State.CLOSED
        over = not self._needs_single and self._clock.now() >= self._open_until
        return State.HALF_OPEN if over else State.OPEN

    def allows_batch(self) -> bool:
        """Whether the next read may be one of many tasks."""
        if self.state is State.CLOSED:  # while the single read is in flight, batch reads go on
            return self._testing or not self._needs_single
        return self.state is State.HALF_OPEN and not self._testing

    def begin(self, *, single: bool) -> bool:
        """A read begins; True if it is a test, so that `test_ended` must follow."""
        test = self._needs_single if single else self.state is not State.CLOSED
        self._testing = self._testing or test
        return test

    def test_ended(self) -> None:
        """A test is over, whatever its outcome."""
        self._testing = False

    def refuses(self, error: EvolinkError) -> bool:
        """Note why a batch read failed; True if the endpoint, not its tasks, is the reason.

        Where the endpoint has worked, one refusal is not enough: a task may be the reason.
        """
        absent = isinstance(error, APIStatusError) and error.status in {404, 405, 501}
        if absent and not (self._has_worked and not getattr(error, "from_api", True)):
            self._open(math.inf, error)
            return True
        if error.retryable and not isinstance(error, InvalidResponseError):
            return False  # also a proxy's 404 page where the endpoint has worked
        self._refusals += 1
        if self._has_worked and self._refusals < _REFUSALS:
            return False
        self._open(_OPEN_MOST, error)
        return True

    def record(self, failure: EvolinkError | None, *, sent_at: float, probe: bool) -> None:
        """Note the outcome of a batch read; *probe* is what `begin` returned for it."""
        if failure is None:
            self._has_worked = True
            self._needs_single = False
            self._open_for = 0.0
            self._failures = self._refusals = self._throttles = 0
            self._single_sent_at = self._single_worked_at = math.inf
        elif probe:
            if self.state is State.HALF_OPEN:  # else another probe has already decided
                longer = self._open_for if failure.is_throttle else 2 * self._open_for
                self._open(min(longer, _OPEN_MOST), failure)
        elif self._only_batch_fails(failure, sent_at):
            self._single_sent_at = self._single_worked_at = math.inf
            self._throttles += 1
            if _may_be_chance(failure) and self._throttles < _THROTTLES:
                self._ask_single()
            else:
                self._open(_OPEN_FIRST, failure)
        elif self._single_worked_at == math.inf:  # else it was sent before that single read
            self._failures += 1
            if self._failures >= _FAILURES or _retry_after(failure) >= _LONG_RETRY_AFTER:
                self._ask_single()

    def _only_batch_fails(self, failure: EvolinkError, sent_at: float) -> bool:
        """Whether a single read has worked under the same conditions.

        For a 429 it must have been answered before: it may have used up what the limit allows.
        """
        if _may_be_chance(failure):
            return sent_at > self._single_worked_at
        return sent_at >= self._single_sent_at

    def record_single(self, failure: EvolinkError | None, *, sent_at: float) -> None:
        """Note the outcome of a single read, which may show that only batch reads fail."""
        if not self._needs_single:
            return
        self._needs_single = False
        self._failures = 0
        now = self._clock.now()
        if failure is None:
            self._single_sent_at, self._single_worked_at = sent_at, now
        else:
            self._single_sent_at = self._single_worked_at = math.inf
        self._open_until = max(self._open_until, now + self._open_for)

    def _ask_single(self) -> None:
        """Send a single read before the next batch read."""
        if not self._needs_single:
            self._needs_single = True
            self.stops += 1

    def _open(self, seconds: float, why: EvolinkError) -> None:
        """Open for *seconds*, counted anew from the first single read that is answered.

        It may be late: a cool-down holds back all reads.
        """
        seconds = max(seconds, _OPEN_PER_RETRY_AFTER * _retry_after(why))
        if seconds > self._open_for or self.state is not State.OPEN:
            self._open_until, self._open_for = self._clock.now() + seconds, seconds
            logger.info("polling tasks one by one for %s s: %s", seconds, why)
        self._ask_single()


def _may_be_chance(error: EvolinkError) -> bool:
    """True for a 429 or 503 that asks for a short wait at most: any request may meet one."""
    return error.is_throttle and _retry_after(error) < _LONG_RETRY_AFTER


def _retry_after(error: EvolinkError) -> float:
    """Seconds for which a failed read holds back all requests."""
    if not error.is_throttle:
        return 0.0
    return min(getattr(error, "retry_after", None) or 0.0, MAX_RETRY_AFTER)
