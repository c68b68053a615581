"""Who may send now: seats, the session-wide cool-down with its slow start, the request rate."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from attrs import define, field

from evolink_async._clock import Clock
from evolink_async._http.retry import MAX_RETRY_AFTER
from evolink_async.errors import APIStatusError

__all__ = ["Gate"]

logger = logging.getLogger(__name__)

_SHORTEST_COOL_DOWN: Final = 0.001
"""What any clock can tell from nothing."""
_FIRST_COOL_DOWN: Final = 1.0
_LONGEST_COOL_DOWN: Final = 60.0
_CHANNEL: Final = "no_available_channel"


@define
class _CoolDown:
    """One cool-down, of the session or of the submits of one model, and its slow start.

    Attributes:
        until: When it ends, on the session's clock.
        since: When it was last begun.
        streak: How often it was begun in a row without a number of seconds.
        window: Requests that may be in the air after it.
        in_air: Those that were let in since it was last begun.
        waiting: Who waits for the window, where that is not the gate's queue.
    """

    until: float = float("-inf")
    since: float = float("-inf")
    streak: int = 0
    window: float = float("inf")
    in_air: int = 0
    waiting: list[asyncio.Future[None]] = field(factory=list)

    def extend(self, retry_after: float | None, *, sent_at: float, now: float) -> bool:
        """Obey one more answer; False if it says nothing new.

        Answers to what was already in the air when it began come with a ``retry_after``
        of their own, or say nothing new.
        """
        news = sent_at > self.since
        delay = retry_after or 0.0  # "at once" is no answer to how long: back off as without
        if not delay and not news:
            return False
        if delay:
            delay = max(delay, _SHORTEST_COOL_DOWN)
        else:
            self.streak += 1
            delay = min(_LONGEST_COOL_DOWN, _FIRST_COOL_DOWN * 2.0 ** min(self.streak - 1, 10))
        # Synchronised clients are what a cool-down must not create: always a little late.
        late = random.uniform(1.0, 1.1)  # noqa: S311 - jitter
        self.until = max(self.until, now + min(delay, MAX_RETRY_AFTER) * late)
        self.window = 1
        if news:
            self.since, self.in_air = now, 0
        return True

    @property
    def is_slow(self) -> bool:
        """Whether there is a limit to what may be in the air."""
        return self.window < float("inf")

    def allows(self, now: float) -> bool:
        """Whether one more request may be sent *now*."""
        return self.until <= now and self.in_air < self.window

    def left(self, entered: float) -> None:
        """A request let in when it *entered* is over; what was in the air before does not count."""
        if entered > self.since:
            self.in_air = max(0, self.in_air - 1)
        if self.waiting:
            self._wake()

    def widen(self, enough: int) -> bool:
        """One request after it succeeded; True once *enough* have."""
        self.streak = 0
        self.window += 1
        if self.window >= enough:
            self.window = float("inf")
        self._wake()
        return not self.is_slow

    def _wake(self) -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(None)
        self.waiting.clear()

    async def changes(self) -> None:
        """Return when the window may have room."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        await future


_Entry = tuple[int, "asyncio.Future[Any]", Callable[[], object]]
"""Who waits for a seat: when it came, what is done if it waits no more, and how it is let in."""


class Gate:
    """Lets requests to the API through, in order of arrival.

    aiohttp's own pool never queues behind it: a time-out that starts after the gate
    says whether a request was sent.

    - *Seats.* At most *seats* requests in the air; two of them are for reads only (of
      four or more; one of two or three), so that a burst of submits cannot starve polling.
    - *Cool-down.* `cool_down` closes the gate for everybody. Afterwards it opens one
      request at a time, each success admitting one more, until all seats are open.
    - *Rate.* A token bucket of one request: they are spaced, never bunched. While reads and
      submits both wait, they take turns.
    """

    def __init__(self, clock: Clock, *, seats: int, rate: float | None = None) -> None:
        """A gate of *seats*, *rate* requests a second at most."""
        self._clock = clock
        self._seats = seats
        self._submit_seats = seats - (2 if seats >= 4 else 1 if seats >= 2 else 0)
        self._reads = 0
        self._submits = 0
        # Of reads, and of submits.
        self._queues: tuple[deque[_Entry], deque[_Entry]] = deque(), deque()
        self._order = itertools.count()
        self._rate = rate
        self._after_submit = False
        self._tokens = 1.0
        self._filled_at = 0.0
        self._closed = _CoolDown()
        self._held: dict[str, _CoolDown] = {}
        self._alarm: asyncio.Task[None] | None = None
        self._pumping = False
        self.cool_downs = 0

    @property
    def closed_until(self) -> float:
        """When the current cool-down ends, on the session's clock; in the past if none."""
        return self._closed.until

    @property
    def waiting(self) -> int:
        """Requests queued here."""
        return sum(map(len, self._queues))

    @property
    def is_contended(self) -> bool:
        """Whether submits that wait take each token of the rate before a read can ask for it.

        A read has to wait among them then, where one does already it is not.
        """
        waiting = self._rate is not None and self._next() is True and not self._queues[False]
        return waiting and self._closed.until <= self._clock.now()

    async def enter(self, *, submit: bool = False, model: str = "", seated: bool = False) -> None:
        """Wait for a seat; `leave` gives it back.

        Args:
            submit: Whether a generation is submitted.
            model: Its model, which may have a cool-down of its own.
            seated: Whether it has a seat already, from `take_seat`.
        """
        while True:
            if not seated:
                await self.take_seat(submit=submit)
            if not submit or self.admit(model):
                return
            seated = False
            self.decline(submit=submit)
            while (held := self._held.get(model)) and not held.allows(self._clock.now()):
                if held.until > self._clock.now():
                    await self._clock.sleep_until(held.until)
                else:
                    await held.changes()

    def admit(self, model: str) -> bool:
        """Whether a submit of *model* with a seat need not wait for a cool-down of its model."""
        held = self._held.get(model)
        if held is None:
            return True
        if not held.allows(self._clock.now()):
            return False
        held.in_air += 1
        return True

    async def take_seat(self, *, submit: bool) -> None:
        """Wait for a seat, whatever the model."""
        if self.find_seat(submit=submit):
            return
        future = asyncio.get_running_loop().create_future()
        self.queue(future, partial(future.set_result, None), submit=submit)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.decline(submit=submit)  # let in, and cancelled before it could run
            raise

    def find_seat(self, *, submit: bool) -> bool:
        """Take a seat if there is one for who has to wait for nobody."""
        return self._next() is None and self._has_seat(submit=submit) and self._take(submit=submit)

    def queue(
        self, future: asyncio.Future[Any], let_in: Callable[[], object], *, submit: bool
    ) -> None:
        """Call *let_in* with a seat taken once there is one, unless *future* is done by then.

        `turn_away` tells *future* that there will be none.
        """
        self._queues[submit].append((next(self._order), future, let_in))
        self._pump()

    def decline(self, *, submit: bool) -> None:
        """Give a seat back unused, and the rate's token with it."""
        self._tokens += 1
        self.leave(submit=submit)

    def leave(
        self, *, submit: bool = False, model: str = "", entered: float = float("inf")
    ) -> None:
        """Give a seat back.

        Args:
            submit: Whether it was a submit's.
            model: Its model.
            entered: When it was taken; by default after whatever cool-down there was.
        """
        if submit:
            self._submits -= 1
        else:
            self._reads -= 1
        if (held := self._held.get(model)) is not None:
            held.left(entered)
        self._closed.left(entered)
        self._pump()

    def succeeded(self, *, sent_at: float, model: str = "") -> None:
        """An answer came that asks for no patience: widen the slow start.

        Args:
            sent_at: When its request was sent; from before a cool-down it says nothing.
            model: The model of the submit it answers.
        """
        held = self._held.get(model)
        if held is not None and sent_at > held.since and held.widen(self._seats):
            del self._held[model]
        if self._closed.is_slow and sent_at > self._closed.since:
            self._closed.widen(self._seats)
            self._pump()

    def cool_down(self, error: APIStatusError, *, sent_at: float, model: str = "") -> None:
        """Obey an answer that asks for patience.

        Args:
            error: The 429 or 503.
            sent_at: When its request was sent: answers to what was already in the air
                when a cool-down began do not lengthen its back-off.
            model: The model of the submit it answers.
        """
        now = self._clock.now()
        if error.code == _CHANNEL and model:
            held = self._held.setdefault(model, _CoolDown())
            held.extend(error.retry_after, sent_at=sent_at, now=now)
            return
        news = sent_at > self._closed.since
        if not self._closed.extend(error.retry_after, sent_at=sent_at, now=now):
            return
        if news:
            self.cool_downs += 1
            logger.warning("cooling down for %.1f s: %s", self._closed.until - now, error)

    def _take(self, *, submit: bool) -> bool:
        """Take a free seat, if cool-down and rate allow a request now."""
        if self.ready_at() > self._clock.now():
            return False
        if self._rate is not None:
            self._tokens -= 1
            self._after_submit = submit
        if submit:
            self._submits += 1
        else:
            self._reads += 1
        self._closed.in_air += 1
        return True

    def _has_seat(self, *, submit: bool) -> bool:
        in_air = self._reads + self._submits
        return (
            in_air < self._seats
            and self._closed.in_air < self._closed.window
            and not (submit and self._submits >= self._submit_seats)
        )

    def ready_at(self) -> float:
        """When cool-down and rate allow the next request."""
        if self._rate is None:
            return self._closed.until
        now = self._clock.now()
        earned = (now - self._filled_at) * self._rate
        self._tokens = min(1.0, self._tokens + max(0.0, earned))
        self._filled_at = now
        missing = max(0.0, 1.0 - self._tokens) / self._rate
        # A token that is missing by less than the clock can tell counts as there. Never later
        # than that: who asks compares with a time of its own, read a moment before this.
        return max(self._closed.until, now + missing) if missing > 1e-9 else self._closed.until

    def _pump(self) -> None:
        """Let in whoever may enter now, first come first served, past submits without a seat."""
        if self._pumping:  # who is let in gave the seat back: that is gone on with below
            return
        self._pumping = True
        try:
            while (
                self._reads + self._submits < self._seats
                and (submit := self._next()) is not None
                and self._has_seat(submit=submit)
            ):
                if not self._take(submit=submit):
                    self._set_alarm()
                    return
                self._queues[submit].popleft()[2]()
        finally:
            self._pumping = False

    def _next(self) -> bool | None:
        """Whose turn it is: True a submit's, False a read's, None nobody's."""
        reads, submits = self._queues
        while reads and reads[0][1].done():
            reads.popleft()
        while submits and submits[0][1].done():
            submits.popleft()
        if submits and self._submits < self._submit_seats:
            if reads and self._rate is not None:
                return not self._after_submit
            return not reads or submits[0][0] < reads[0][0]
        return False if reads else None

    def _set_alarm(self) -> None:
        if self._alarm is None:
            # No factory of the caller's makes it: one may refuse, or run it at once.
            self._alarm = asyncio.Task(self._ring(), loop=asyncio.get_running_loop())
            self._alarm.add_done_callback(self._rung)

    async def _ring(self) -> None:
        while (at := self.ready_at()) > self._clock.now():
            await self._clock.sleep_until(at)

    def _rung(self, alarm: asyncio.Task[None]) -> None:
        """It is time, or others have cancelled the alarm, which is set again then."""
        self._alarm = None
        failure = None if alarm.cancelled() else alarm.exception()
        if failure is None:
            self._pump()
        else:  # a clock of the caller's: nobody can say when to go on
            for queue in self._queues:
                _fail(queue, lambda: failure)

    async def aclose(self) -> None:
        """Stop the alarm; nobody may be waiting any more."""
        if self._alarm is not None:
            self._alarm.cancel()
            await asyncio.gather(self._alarm, return_exceptions=True)


def _fail(queue: deque[_Entry], reason: Callable[[], BaseException]) -> None:
    """Tell all in *queue* that they will not be let in."""
    for _, future, _ in queue:
        if not future.done():
            future.set_exception(reason())
    queue.clear()
