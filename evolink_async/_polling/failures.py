"""What failed polls mean for a task: go on, poll it alone, or give it up.

A failed poll by itself ends no watch. A refusal that single polls confirm does. A task that
batch polls fail on, or leave out, is polled singly from then on.
"""

from __future__ import annotations

import math
from typing import Final

from attrs import define

from evolink_async.errors import (
    APIStatusError,
    AuthenticationError,
    EvolinkError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
)

__all__ = ["BatchPolls", "Failures"]

_CONFIRM_AFTER: Final = 5.0
"""Seconds that must lie between two 404s for the second to confirm the first."""
_LEFT_OUT: Final = 5
"""Batch answers in a row that leave a new task out before it is polled singly."""
_BATCH_FAILURES: Final = (3, 6)
"""Batch polls in a row that fail with a task, while others work, before it is polled singly:
where batch polls seldom fail, and where they often do."""
_OFTEN: Final = 0.15
"""Share of failed batch polls from which they fail often."""
_SHARE_RATE: Final = 0.05
"""What one batch poll weighs in that share."""


@define
class BatchPolls:
    """How batch polls have gone of late.

    Attributes:
        worked_at: When the last one that was answered was sent.
        failing: The share of them that fail.
    """

    worked_at: float = -math.inf
    failing: float = 0.0

    def add(self, failure: EvolinkError | None, *, sent_at: float) -> None:
        """Note a batch poll that was sent at *sent_at*."""
        if failure is None:
            self.worked_at = sent_at
        if failure is None or not failure.is_throttle:
            self.failing += _SHARE_RATE * ((failure is not None) - self.failing)


@define
class Failures:
    """The failed polls of one task in a row, and the batch answers that left it out.

    Attributes:
        error: Why the last poll failed, None if it did not.
        since: When the first of the failed polls was sent.
        count: How many there are.
        throttles: How many of them only asked to wait (429, 503).
        refusals: How many of them, up to the last, were the same final refusal.
        refused_at: When the first of these came.
        left_out: Batch answers in a row that left the task out.
        suspected: How often batch polls failed with it while others worked, since a batch
            poll with it was answered.
        single: True while it must be polled singly.
    """

    error: EvolinkError | None = None
    since: float = math.inf
    count: int = 0
    throttles: int = 0
    refusals: int = 0
    refused_at: float = 0.0
    left_out: int = 0
    suspected: int = 0
    single: bool = False

    def add(self, error: EvolinkError, *, sent_at: float) -> None:
        """Note a poll that was sent at *sent_at* and failed."""
        self.error = error
        self.since = min(self.since, sent_at)
        self.count += 1
        self.throttles += error.is_throttle

    def confirms(self, error: EvolinkError, *, now: float, may_lag: bool) -> bool:
        """Note how a single poll failed; True if it confirms a refusal, which ends the watch.

        Only the API's own final refusals count: twice the same for 401, 403 and 404, three
        times for any other. With *may_lag* a 404 may only mean that a replica is behind.
        Asked before the error is added.
        """
        if not isinstance(error, APIStatusError) or not error.from_api or error.retryable:
            return False
        missing = isinstance(error, NotFoundError)
        if missing and may_lag:
            return False
        if self.refusals == 0 or type(error) is not type(self.error):
            self.refusals, self.refused_at = 1, now
            return False
        if missing and now - self.refused_at < _CONFIRM_AFTER:
            return False
        self.refusals += 1
        twice = isinstance(error, NotFoundError | AuthenticationError | PermissionDeniedError)
        return self.refusals >= (2 if twice else 3)

    def suspect(self, batches: BatchPolls) -> bool:
        """After a failed batch poll: True if the task must now be polled singly.

        It must where batch polls with it keep failing while others work.
        """
        failed = self.count - self.throttles + self.suspected
        needed = _BATCH_FAILURES[batches.failing > _OFTEN]
        if batches.worked_at > self.since and failed >= needed:
            self.suspected += 1
            self.single = True
        return self.single

    def most_together(self, limit: int) -> int:
        """How many tasks of *limit* to poll together next, this one first.

        After a refusal or an unreadable answer, half as many each time: one of them may be
        the reason. A failure that says nothing about the tasks, such as a 502, changes nothing.
        """
        error = self.error
        if error is None or (error.retryable and not isinstance(error, InvalidResponseError)):
            return limit
        return max(1, limit >> self.count)

    def miss(self, *, may_lag: bool) -> bool:
        """Note that a batch answer left it out; True if it must now be polled singly.

        With *may_lag* a replica may only be behind, so it takes several such answers.
        """
        self.left_out += 1
        self.single = self.left_out >= _LEFT_OUT or not may_lag
        return self.single

    def after_answer(self, *, single: bool) -> Failures | None:
        """What remains after a poll was answered; None for nothing.

        An answer to a *single* poll does not show that batch polls work with the task again.
        """
        if not single or not (self.left_out or self.suspected):
            return None
        return Failures(left_out=self.left_out, suspected=self.suspected, single=self.suspected > 1)
