"""Whether tasks can be read together: the batch endpoint, which is undocumented, is on trial."""

from __future__ import annotations

import logging
import math
from typing import Final

from attrs import define, field

from evolink_async._clock import Clock
from evolink_async._http.retry import MAX_RETRY_AFTER
from evolink_async.errors import APIStatusError, EvolinkError, InvalidResponseError

__all__ = ["BatchEndpoint"]

logger = logging.getLogger(__name__)

_REFUSALS: Final = 3
"""Refused reads in a row after which it is left alone; never to have worked counts as all but
one."""
_REFUSED_REST: Final = 300.0
"""Seconds it is left alone then, and at the most where it only fails, any ``Retry-After`` apart."""
_FAILED_REST: Final = 30.0
"""Seconds it is left alone at first where it fails while single reads work."""
_PROBE_AFTER: Final = 3
"""Failed reads in a row after which a single read tells whether only they fail."""
_DOUBTS: Final = 3
"""How often in a row only they must have, where they were told to have patience: a server that
limits requests may say so of any, but not always of those."""
_LONG_PATIENCE: Final = 10.0
"""Seconds of patience asked for after which the next request must work: once is enough then."""
_REST_FACTOR: Final = 10.0
"""A rest is at least so many times the patience that the next try may cost everybody again."""


@define
class BatchEndpoint:
    """What is known of it.

    One that is not there stays away, one that refuses or talks nonsense is left alone for a
    while, and so is one that fails while single reads work; then one read at a time finds out,
    after twice as long each time. A single refusal counts for less where it has worked, for then
    one of the tasks may be what it cannot deal with.
    """

    _clock: Clock
    # It is left alone until then; for how long, 0 once it has worked since.
    _until: float = field(default=-math.inf, init=False)
    _rest: float = field(default=0.0, init=False)
    # Whether a read that is to find something out is in the air.
    _trying: bool = field(default=False, init=False)
    # Whether it ever worked.
    _known: bool = field(default=False, init=False)
    # Reads that failed in a row; when a single one after them did not; how often that was so.
    _failures: int = field(default=0, init=False)
    _single_worked_at: float = field(default=math.inf, init=False)
    _doubts: int = field(default=0, init=False)
    # Reads that were refused.
    _refusals: int = field(default=_REFUSALS - 1, init=False)

    def is_usable(self) -> bool:
        """Whether to read tasks together now."""
        if self._is_failing:  # while one single read finds out, the others go on as they were
            return self._trying and not self._rest
        return not self.is_resting()

    def is_resting(self) -> bool:
        """Whether it is left alone, but for one read that finds out whether it works again."""
        return self._clock.now() < self._until or (self._rest > 0 and self._trying)

    @property
    def _is_failing(self) -> bool:
        return self._failures >= _PROBE_AFTER

    @property
    def on_trial(self) -> bool:
        """Whether the next read is to find something out, so that others wait until it begins."""
        return self._rest > 0 or self._is_failing

    def begin(self, *, single: bool) -> bool:
        """A read begins; True if it is to find out what works, and `ended` is to follow."""
        trial = self._is_failing if single else self._rest > 0
        self._trying = self._trying or trial
        return trial

    def ended(self) -> None:
        """A read that was to find something out is over, whatever became of it."""
        self._trying = False

    def meaning(self, error: EvolinkError) -> EvolinkError | None:
        """What a failed read says of each of its tasks: None, read it singly, if nothing."""
        absent = isinstance(error, APIStatusError) and error.status in {404, 405, 501}
        # Where it has worked, a page that is not the API's is a proxy that lost its way for once.
        if absent and not (self._known and not getattr(error, "from_api", True)):
            self._leave(math.inf, error)
            return None
        if error.retryable and not isinstance(error, InvalidResponseError):
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
            self._known, self._rest = True, 0.0
            self._failures = self._doubts = self._refusals = 0
            self._single_worked_at = math.inf
        elif probe:
            if self.on_trial and sent_at >= self._until:  # else another has told already
                longer = self._rest if failure.is_throttle else 2 * self._rest
                self._leave(min(longer, _REFUSED_REST), failure)
                self._failures = _PROBE_AFTER  # a single read comes before the next
        elif sent_at >= self._single_worked_at:
            self._single_worked_at = math.inf
            self._doubts += 1
            if (
                failure.is_throttle
                and _patience(failure) < _LONG_PATIENCE
                and self._doubts < _DOUBTS
            ):
                self._failures = _PROBE_AFTER
            else:
                self._leave(_FAILED_REST, failure)
        else:
            self._failures += 1 if _patience(failure) < _LONG_PATIENCE else _PROBE_AFTER

    def judge_by_single(self, failure: EvolinkError | None) -> None:
        """Note what became of a single read, which may say that only batch reads fail."""
        if self._is_failing:
            self._failures = 0
            self._single_worked_at = math.inf if failure else self._clock.now()

    def _leave(self, rest: float, why: EvolinkError) -> None:
        now = self._clock.now()
        patience = _patience(why)  # meanwhile nothing is read
        rest = max(rest, _REST_FACTOR * patience)
        if now + patience + rest > self._until:
            self._until, self._rest = now + patience + rest, rest
            logger.info("reading tasks one by one for %s s: %s", rest, why)


def _patience(error: EvolinkError) -> float:
    """Seconds a failed read made everybody wait."""
    if not error.is_throttle:
        return 0.0
    return min(getattr(error, "retry_after", None) or 0.0, MAX_RETRY_AFTER)
