"""What all items of one run share: the ledger, the money, and whether the run goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from attrs import define, field, frozen

from evolink_async._clock import hold
from evolink_async._session import Session
from evolink_async.batch._budget import Money
from evolink_async.batch._ledger import EXPIRED, NOT_FOUND, Item, Ledger
from evolink_async.batch._progress import BatchProgress, Progress, Stop
from evolink_async.errors import (
    APIStatusError,
    AuthenticationError,
    EvolinkError,
    InsufficientCreditsError,
    SubmitUncertainError,
)

__all__ = ["Options", "RunContext"]

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

REPORT_EVERY: Final = 1.0
"""Real seconds between two reports while nothing changes."""
_OUTAGE_PAUSE: Final = 15.0
"""Least seconds without submits once the API takes none."""
_MOST_UNCERTAIN: Final = 8
"""Submits in a row of unknown outcome after which no more money is put at risk."""
_RUNNING_IS_WAITED_FOR: Final = frozenset({"credits", "max_credits"})
"""After these stops, what runs is waited for however long it takes."""


@frozen(kw_only=True)
class Options:
    """What the caller of `run_batch` has asked for."""

    resend_uncertain: bool
    resubmit_expired: bool
    grace: float
    outage_timeout: float
    progress: Callable[[BatchProgress], None] | None


@define(eq=False, kw_only=True)
class SubmitHealth:
    """How the API has answered submits of late; times are the session's clock's.

    Attributes:
        accepted_any: Whether it has ever accepted one of this batch.
        accepted_at: When it did last; at first, when the run began.
        paused_until: No submit before then.
        uncertain_in_a_row: Submits of unknown outcome since it did.
    """

    accepted_any: bool
    accepted_at: float
    paused_until: float
    uncertain_in_a_row: int = 0


@define(eq=False, kw_only=True)
class RunContext:
    """One run of a batch, as its items see it.

    Attributes:
        stop: Why no more is submitted; None while more is.
        error: What ends the run at once.
        leave_at: When the run ends whatever is still running, by the event loop's time.
        ending: Set at each change of these three.
        waiting: Workers whose submit waits for its turn, and of which nothing has left.
        replaced: Numbers of failed items to be bought anew: what was paid for is lost.
    """

    session: Session
    ledger: Ledger
    folder: Path
    options: Options
    money: Money
    progress: Progress
    stop: Stop | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    leave_at: float | None = field(default=None, init=False)
    ending: asyncio.Event = field(factory=asyncio.Event, init=False)
    waiting: set[asyncio.Task[Any] | None] = field(factory=set, init=False)
    replaced: set[int] = field(factory=set, init=False)
    health: SubmitHealth = field(init=False)
    _changed: asyncio.Event = field(factory=asyncio.Event, init=False)

    def __attrs_post_init__(self) -> None:
        now = self.session.clock.now()
        self.health = SubmitHealth(
            accepted_any=bool(self.money.prices), accepted_at=now, paused_until=now
        )

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do *work* in a thread; a clock that can be held does not run meanwhile."""
        with hold(self.session.clock):
            return await asyncio.to_thread(work, *args, **kwargs)

    # -- progress --------------------------------------------------------------------------

    def moved(self, before: str, after: str) -> None:
        """An item has gone from one state to another."""
        self.notify()
        self.progress.moved(before, after)
        self.report()

    def report(self) -> None:
        """Tell the caller how it goes; what that raises is raised here, and ends the run."""
        if self.options.progress is None:
            return
        try:
            self.options.progress(self.progress.now(self.money, self.stop))
        except Exception as exc:
            self.fail(exc)
            raise

    async def keep_reporting(self) -> None:
        """Rate and time left change while nothing else does."""
        while self.options.progress is not None:
            await asyncio.sleep(REPORT_EVERY)
            self.report()

    # -- changes ---------------------------------------------------------------------------

    def notify(self) -> None:
        """Something that a submit may wait for has changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def next_change(self) -> None:
        """Wait for any item to move, for a stop, or for the end of a pause."""
        changed = asyncio.ensure_future(self._changed.wait())
        waits: set[asyncio.Future[Any]] = {changed}
        if self.paused:
            clock = self.session.clock
            pause = clock.sleep_until(self.health.paused_until)
            waits.add(asyncio.ensure_future(pause))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    # -- stopping --------------------------------------------------------------------------

    @property
    def going(self) -> bool:
        """Whether more may be submitted."""
        return self.stop is None and self.error is None

    def halt(self, kind: str, message: str) -> None:
        """Submit no more; what runs is given its time."""
        waits = kind in _RUNNING_IS_WAITED_FOR
        if self.stop is not None and (waits or self.stop.kind not in _RUNNING_IS_WAITED_FOR):
            return  # it has stopped as hard already
        self.stop = Stop(kind=kind, message=message)
        if not waits:
            self.leave_at = asyncio.get_running_loop().time() + self.options.grace
        for worker in self.waiting:
            if worker is not None:
                worker.cancel()
        self.ending.set()
        self.notify()
        self.report()

    def halt_for(self, exc: EvolinkError) -> None:
        """Submit no more because of a refusal that concerns all items."""
        if isinstance(exc, AuthenticationError):
            self.halt("authentication", f"the API refuses the key: {exc}")
        elif isinstance(exc, InsufficientCreditsError):
            self.halt("credits", f"nothing is left to spend: {exc}")
        else:
            self.halt("closed", "the session was closed; run the same batch again to go on")

    def fail(self, exc: BaseException) -> None:
        """End the run at once, with *exc*."""
        self.error = self.error or exc
        self.ending.set()
        self.notify()

    async def guard(self, work: Awaitable[None]) -> None:
        """Await *work*; a failure of the disk stops the run, another failure ends it at once."""
        try:
            await work
        except Exception as exc:  # noqa: BLE001 - the run raises it
            disk = isinstance(exc, OSError) and not isinstance(exc, EvolinkError)
            if not disk or self.error is not None:
                self.fail(exc)
                return
            self.halt(
                "disk",
                f"the folder {self.folder} cannot be used any more: "
                f"{getattr(exc, 'strerror', None) or exc}; see to that, then run the same batch "
                "again",
            )

    # -- how the API takes submits ---------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether submits are put off."""
        return self.session.clock.now() < self.health.paused_until

    def accepted(self) -> None:
        """The API has accepted a submit."""
        health = self.health
        health.accepted_any, health.uncertain_in_a_row = True, 0
        health.accepted_at = self.session.clock.now()

    def put_off(self, item: Item, exc: EvolinkError) -> None:
        """The API takes no submits: pause, and after long enough stop."""
        now, health = self.session.clock.now(), self.health
        if now - health.accepted_at >= self.options.outage_timeout:
            self.halt("network", f"the API takes no submits: {exc}; run the same batch again")
        after = exc.retry_after if isinstance(exc, APIStatusError) else None
        # One warning for all that are put off by the same outage.
        level = logging.DEBUG if self.paused else logging.WARNING
        health.paused_until = max(health.paused_until, now + max(_OUTAGE_PAUSE, after or 0.0))
        logger.log(level, "submits are put off, that of %s first: %s", item.place, exc)

    def count_uncertain(self, exc: SubmitUncertainError) -> None:
        """One more submit of unknown outcome: too many in a row stop the run."""
        self.health.uncertain_in_a_row += 1
        if (count := self.health.uncertain_in_a_row) >= _MOST_UNCERTAIN:
            self.halt(
                "network",
                f"{count} submits in a row may or may not have been accepted, the last "
                f"because: {exc.__cause__ or 'no answer came'}; see what is wrong before you go on",
            )

    # -- what is lost ----------------------------------------------------------------------

    def may_replace(self, item: Item) -> bool:
        """Whether it is to be bought anew if its task or its results are still lost."""
        lost = {"submitted": NOT_FOUND, "completed": EXPIRED}.get(item.state)
        return self.options.resubmit_expired and lost is not None and item.code == lost
