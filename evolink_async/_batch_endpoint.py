"""Whether tasks can be read together: the batch endpoint, which is undocumented, is on trial."""

from __future__ import annotations

import logging
import math
from typing import Final

from attrs import define, field

from evolink_async._clock import Clock
from evolink_async._protocol import is_throttle, rule_of
from evolink_async.errors import APIStatusError, EvolinkError, InvalidResponseError

__all__ = ["BatchEndpoint"]

logger = logging.getLogger(__name__)

_REFUSALS: Final = 3
"""Refused reads in a row after which it is left alone; never to have worked counts as all but
one."""
_REFUSED_REST: Final = 300.0
"""Seconds it is left alone then, and the most it is left alone where it only fails."""
_FAILED_REST: Final = 30.0
"""Seconds it is left alone at first where it fails while single reads work."""
_PROBE_AFTER: Final = 3
"""Failed reads in a row after which a single read tells whether only they fail."""


@define
class BatchEndpoint:
    """What is known of it.

    One that is not there stays away, one that refuses or talks nonsense is left alone for a
    while, and so is one that fails while single reads work; then one read at a time finds out,
    after twice as long each time. A single refusal counts for less where it has worked, for then
    one of the tasks may be what it cannot deal with.
    """

    _clock: Clock
    # It is left alone until then; for how long, 0 once it has worked since; whether one read is
    # finding out.
    _until: float = field(default=-math.inf, init=False)
    _rest: float = field(default=0.0, init=False)
    _probing: bool = field(default=False, init=False)
    # Whether it ever worked; when last, at first when it began to have the benefit of the doubt.
    _known: bool = field(default=False, init=False)
    _worked_at: float = field(init=False)
    # Reads that failed in a row; when a single one after them did not; reads that were refused.
    _failures: int = field(default=0, init=False)
    _single_worked_at: float = field(default=math.inf, init=False)
    _refusals: int = field(default=_REFUSALS - 1, init=False)

    def __attrs_post_init__(self) -> None:
        self._worked_at = self._clock.now()

    def is_usable(self) -> bool:
        """Whether to read tasks together now."""
        failing = self._failures >= _PROBE_AFTER
        return not (failing or self._probing or self._clock.now() < self._until)

    @property
    def on_trial(self) -> bool:
        """Whether the next read of several tasks is to find out whether that works again."""
        return self._rest > 0

    def begin(self) -> bool:
        """A read of several tasks is sent; True if it is to find out whether that works again."""
        self._probing = self.on_trial
        return self._probing

    def probed(self) -> None:
        """That read is over, whatever became of it."""
        self._probing = False

    def meaning(self, error: EvolinkError) -> EvolinkError | None:
        """What a failed read says of each of its tasks: None, read it singly, if nothing."""
        absent = isinstance(error, APIStatusError) and error.status in {404, 405, 501}
        # Where it has worked, a page that is not the API's is a proxy that lost its way for once.
        if absent and not (self._known and not getattr(error, "from_api", True)):
            self._leave(math.inf, error)
            return None
        if rule_of(error)[0] and not isinstance(error, InvalidResponseError):
            return error
        self._refusals += 1
        if self._refusals < _REFUSALS:
            return error
        self._leave(_REFUSED_REST, error)
        return None

    def judge(self, failure: EvolinkError | None, *, sent_at: float, probe: bool) -> None:
        """Tell an endpoint that fails by itself from an outage.

        After some failures in a row a single read is tried. If it works and the next read of
        several fails all the same, it is the endpoint.
        """
        if failure is None:
            self._known, self._worked_at, self._rest = True, sent_at, 0.0
            self._failures, self._single_worked_at, self._refusals = 0, math.inf, 0
        elif probe:
            if self.on_trial and sent_at >= self._until:  # else another has told already
                longer = self._rest if is_throttle(failure) else 2 * self._rest
                self._leave(min(longer, _REFUSED_REST), failure)
        elif is_throttle(failure) and sent_at < self._worked_at + _FAILED_REST:
            pass  # that is said of all requests, and has its price
        elif sent_at >= self._single_worked_at:
            self._single_worked_at = math.inf
            self._leave(_FAILED_REST, failure)
        else:
            self._failures += 1

    def judge_by_single(self, failure: EvolinkError | None) -> None:
        """Note what became of a single read, which may say that only batch reads fail."""
        if self._failures >= _PROBE_AFTER:
            self._failures = 0
            self._single_worked_at = math.inf if failure else self._clock.now()

    def _leave(self, rest: float, why: EvolinkError) -> None:
        now = self._clock.now()
        if now + rest > self._until:
            self._until, self._rest = now + rest, rest
            logger.info("reading tasks one by one for %s s: %s", rest, why)
