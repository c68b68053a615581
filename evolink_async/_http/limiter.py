"""When a request may be sent: permits, cool-downs with a slow start, the request rate."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import deque
from math import inf
from typing import Final, Self

from attrs import define, field

from evolink_async._clock import Clock, Timer
from evolink_async._http.retry import MAX_RETRY_AFTER
from evolink_async.errors import APIStatusError

__all__ = ["Limiter", "Permit"]

logger = logging.getLogger(__name__)

_LONGEST_BACKOFF: Final = 60.0
"""Seconds of a cool-down without ``Retry-After`` at most; the first takes one second."""


@define(eq=False)
class _CoolDown:
    """A cool-down, of the session or of the submits of one model, and the slow start after it.

    Attributes:
        until: When it ends, on the session's clock.
        since: When it last began.
        streak: How often it began in a row without a number of seconds.
        window: How many *permits* there may be after it; each success allows one more.
        permits: Those given since it began, while their number is limited. Requests that were
            in flight before do not count: they may hang.
    """

    until: float = -inf
    since: float = -inf
    streak: int = 0
    window: float = inf
    permits: set[Permit] = field(factory=set)

    def extend(self, retry_after: float | None, *, sent_at: float, now: float) -> bool:
        """Obey an answer that asks to wait; True if it begins anew.

        An answer to a request that was sent before it began only counts if it comes with a
        ``retry_after``. A ``retry_after`` of 0 counts as none.
        """
        begins = sent_at > self.since
        if begins:
            self.since = now
            self.permits.clear()
        elif not retry_after:
            return False
        if not retry_after:
            retry_after = min(_LONGEST_BACKOFF, 2.0 ** min(self.streak, 10))
            self.streak += 1
        # Always a little late, so that not all clients come back at the same moment.
        late = random.uniform(1.0, 1.1)  # noqa: S311 - jitter
        self.until = max(self.until, now + min(retry_after, MAX_RETRY_AFTER) * late)
        self.window = 1
        return begins

    def succeeded(self, *, sent_at: float, enough: int) -> bool:
        """After a success, allow one permit more, and any number from *enough* on.

        True if that changes anything.
        """
        if sent_at <= self.since or self.window == inf:
            return False
        self.streak = 0
        self.window += 1
        if self.window >= enough:
            self.window = inf
        return True

    def has_room(self) -> bool:
        """Whether it allows one more permit."""
        return len(self.permits) < self.window


@define(eq=False)
class _Queue:
    """Requests that wait for a permit, by arrival: reads, or the submits of one model.

    Attributes:
        submits: Whether they are submits.
        cool_down: The model's.
        waiting: The arrival number of each, and the future that gets its permit.
    """

    submits: bool
    cool_down: _CoolDown = field(factory=_CoolDown)
    waiting: deque[tuple[int, asyncio.Future[Permit]]] = field(factory=deque)

    def first(self) -> float:
        """The arrival number of the first, infinity if nothing waits."""
        while self.waiting and self.waiting[0][1].done():  # cancelled
            self.waiting.popleft()
        return self.waiting[0][0] if self.waiting else inf


@define(eq=False)
class Permit:
    """The right to have one request in flight; released at the end of its ``with`` block."""

    _limiter: Limiter
    queue: _Queue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self, *, unused: bool = False) -> None:
        """Give it back; *unused* if nothing was sent that counts against the request rate."""
        self._limiter.take_back(self, unused=unused)


class Limiter:
    """Gives out permits for requests to the API, in order of arrival.

    Requests wait here, never in aiohttp's pool: a time-out that starts with a permit then shows
    whether a request was sent.

    - *Permits.* At most *permits* requests in flight; two of them are for reads only (of
      four or more; one of two or three), so that a burst of submits cannot starve polling.
    - *Cool-down.* After a 429 or 503 nothing gets a permit for a while, then one request at a
      time may be in flight, and one more with each success, until all permits may be used.
      If only a model is unavailable (``no_available_channel``), only its submits wait.
    - *Rate.* At most *rate* requests a second, evenly spaced; idle time is not saved up.
      While reads and submits both wait, they take turns.
    """

    def __init__(self, clock: Clock, *, permits: int, rate: float | None = None) -> None:
        """A limiter of *permits*, and of *rate* requests a second."""
        self._clock = clock
        self._permits = permits
        self._submit_permits = permits - (2 if permits >= 4 else 1 if permits >= 2 else 0)
        self._in_flight = self._submits = 0  # requests, and how many of them are submits
        self._spacing = 0.0 if rate is None else 1 / rate
        self._next_at = -inf  # when the rate allows the next request
        self._after_submit = False
        self._cool_down = _CoolDown()
        self._queues: dict[str | None, _Queue] = {}  # by model, None for reads
        self._arrivals = itertools.count()
        self._timer = Timer(clock, self._serve, self._clock_failed)
        self.cool_downs = 0

    @property
    def cooling_down(self) -> float:
        """Seconds until the session's cool-down ends, 0 if there is none."""
        return max(0.0, self._cool_down.until - self._clock.now())

    def ready_at(self) -> float:
        """When cool-down and rate allow the next request; in the past if they do now."""
        return max(self._cool_down.until, self._next_at)

    def is_contended(self) -> bool:
        """Whether submits that wait would use up the request rate, and no read waits yet.

        Then a read must queue for its turn; a second one would only wait behind it.
        """
        now = self._clock.now()
        if not self._spacing or self._cool_down.until > now:
            return False
        return self._queue(None).first() == inf and self._turn(now) is not None

    # -- permits ---------------------------------------------------------------------------

    async def acquire(self, model: str | None = None) -> Permit:
        """Wait for a permit for a submit of *model*, or else for a read."""
        if (permit := self.try_acquire(model)) is not None:
            return permit
        future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        self._queue(model).waiting.append((next(self._arrivals), future))
        try:
            self._serve()
            return await future
        except BaseException:
            if not (future.cancel() or future.cancelled() or future.exception()):
                future.result().release(unused=True)  # cancelled as it came
            raise

    def try_acquire(self, model: str | None = None) -> Permit | None:
        """A permit, if there is one now and it is not another request's turn."""
        now, queue = self._clock.now(), self._queue(model)
        if self.ready_at() > now or not self._has_room() or not self._may_go(queue, now):
            return None
        return self._give(queue, now) if self._turn(now) is None else None

    def take_back(self, permit: Permit, *, unused: bool) -> None:
        """What `Permit.release` does."""
        self._in_flight -= 1
        self._submits -= permit.queue.submits
        if unused:
            self._next_at -= self._spacing
        for cool_down in (self._cool_down, permit.queue.cool_down):
            cool_down.permits.discard(permit)
        self._serve()

    def _queue(self, model: str | None) -> _Queue:
        return self._queues.get(model) or self._queues.setdefault(model, _Queue(model is not None))

    def _has_room(self) -> bool:
        """Whether one more request may be in flight."""
        return self._in_flight < self._permits and self._cool_down.has_room()

    def _may_go(self, queue: _Queue, now: float) -> bool:
        """Whether it may be one of *queue*."""
        cool_down = queue.cool_down
        has_permit = not queue.submits or self._submits < self._submit_permits
        return has_permit and cool_down.until <= now and cool_down.has_room()

    def _turn(self, now: float) -> _Queue | None:
        """The queue whose first request is next, None if none may go."""
        queues = [q for q in self._queues.values() if q.first() < inf and self._may_go(q, now)]
        if self._spacing:  # reads and submits take turns
            queues = [q for q in queues if q.submits != self._after_submit] or queues
        return min(queues, key=_Queue.first, default=None)

    def _give(self, queue: _Queue, now: float) -> Permit:
        permit = Permit(self, queue)
        self._in_flight += 1
        self._submits += queue.submits
        self._next_at = now + self._spacing
        self._after_submit = queue.submits
        for cool_down in (self._cool_down, queue.cool_down):
            if cool_down.window < inf:
                cool_down.permits.add(permit)
        return permit

    def _serve(self) -> None:
        """Give permits to the requests whose turn it is; set the timer for the next ones."""
        while self._has_room():
            waiting = [queue for queue in self._queues.values() if queue.first() < inf]
            if not waiting:
                return
            now = self._clock.now()
            queue = self._turn(now)
            if queue is None:  # at most submits whose model has a cool-down
                ends = [each.cool_down.until for each in waiting]
                self._timer.set(min((end for end in ends if end > now), default=inf))
                return
            if self.ready_at() > now:
                self._timer.set(self.ready_at())
                return
            queue.waiting.popleft()[1].set_result(self._give(queue, now))

    # -- answers ---------------------------------------------------------------------------

    def succeeded(self, *, sent_at: float, model: str | None = None) -> None:
        """Note an answer that does not ask to wait, to a request that was sent at *sent_at*.

        It is ignored if that was before the cool-down began. *model* is that of a submit.
        """
        for cool_down in (self._cool_down, self._queue(model).cool_down):
            if cool_down.succeeded(sent_at=sent_at, enough=self._permits):
                self._serve()

    def cool_down(self, error: APIStatusError, *, sent_at: float, model: str | None = None) -> None:
        """Obey a 429 or 503, the answer to a request that was sent at *sent_at*.

        Requests that were in flight when a cool-down began do not lengthen its back-off.
        *model* is that of a submit.
        """
        now = self._clock.now()
        if model and error.code == "no_available_channel":
            self._queue(model).cool_down.extend(error.retry_after, sent_at=sent_at, now=now)
        elif self._cool_down.extend(error.retry_after, sent_at=sent_at, now=now):
            self.cool_downs += 1
            logger.warning("cooling down for %.1f s: %s", self.cooling_down, error)
        self._serve()

    # -- the timer -------------------------------------------------------------------------

    def _clock_failed(self, failure: BaseException) -> None:
        """Fail all that wait: without a clock there is no time to go on at."""
        if isinstance(failure, asyncio.CancelledError):
            return  # others cancelled the timer; it is set again
        for queue in self._queues.values():
            while queue.first() < inf:
                queue.waiting.popleft()[1].set_exception(failure)

    def close(self) -> None:
        """Stop the timer; no request may be waiting any more."""
        self._timer.close()
