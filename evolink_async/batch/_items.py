"""One run of a batch: what is started when, and the life of each item.

Every step that costs money is recorded before it is taken, every step that is paid for as
soon as it is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from attrs import define, evolve, field, frozen

from evolink_async._clock import Clock, hold
from evolink_async._model.requests import as_request
from evolink_async._model.snapshots import GenerationResult
from evolink_async._session import Session, read_once, save_result
from evolink_async._task import Task
from evolink_async._text import printable
from evolink_async.batch._budget import Money
from evolink_async.batch._files import (
    disk_error,
    file_of,
    kept_from,
    present,
    stems,
    trouble_with,
    whole,
)
from evolink_async.batch._ledger import Counts, File, Item, Ledger
from evolink_async.errors import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    DownloadError,
    EvolinkError,
    InsufficientCreditsError,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    SessionClosedError,
    SubmitUncertainError,
    TaskCancelledError,
    TaskFailedError,
    TaskTimeoutError,
)

__all__ = ["EXPIRED", "NOT_FOUND", "BatchProgress", "Options", "Run", "Stop"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

NOT_FOUND: Final = "task_not_found"
"""Code of items whose task the API did not know; kept while it is asked once more."""
EXPIRED: Final = "results_expired"
"""Code of items whose results were not fetched in time; kept while they are looked for again."""
_LINKS_LIVE: Final = 24 * 3600.0
"""Seconds after its task completed that a result link works, by the API's page."""
_DOWNLOADS: Final = 8
"""Items downloaded at once."""
_BACKLOG: Final = 64
"""Completed items that may wait for a download before no more are submitted."""
_OUTAGE_PAUSE: Final = 15.0
_DOUBTS: Final = 8
"""Submits in a row of unknown outcome after which no more money is put at risk."""
_MIN_FREE: Final = 64 * 1024 * 1024
"""Bytes the disk must have left before anything more is bought."""
_PAGE: Final = 64
_TELL_EVERY: Final = 1.0
"""Real seconds between two reports of a progress that may not change."""


@frozen(kw_only=True)
class BatchProgress:
    """How a batch is doing. All counts are items, those of earlier runs included.

    Attributes:
        total: All of them.
        queued: Not submitted yet.
        running: Submitted, or being submitted.
        completed: Generated, not yet saved.
        saved: On disk.
        failed: Will not be made.
        uncertain: May have been paid for; see `SubmitUncertainError`.
        credits: Charged or reserved so far, over all runs; at the highest price seen where
            the API has not said how much.
        credits_in_doubt: What uncertain items cost if they were accepted, at that price; not
            among *credits*. None if no price is known.
        rate: Items ended per second of late; None until that can be said.
        seconds_left: Until all have ended, at that rate; None if that cannot be said.
        stopping: Why no more are submitted; None while they are.
    """

    total: int
    queued: int = 0
    running: int = 0
    completed: int = 0
    saved: int = 0
    failed: int = 0
    uncertain: int = 0
    credits: float = 0.0
    credits_in_doubt: float | None = 0.0
    rate: float | None = None
    seconds_left: float | None = None
    stopping: str | None = None


@frozen(kw_only=True)
class Stop:
    """Why a batch stopped submitting before its end.

    Attributes:
        kind: ``interrupted``, ``authentication`` (401), ``credits`` (402), ``refused``
            (403 or 404 before anything was accepted), ``max_credits``,
            ``network``, ``disk`` or ``closed`` (the session was).
        message: The same in words, with what to do next.
    """

    kind: str
    message: str


@frozen(kw_only=True)
class Options:
    resend_uncertain: bool
    resubmit_expired: bool
    max_credits: float | None
    grace: float
    patience: float


class _HaltedError(Exception):
    """Raised before a POST leaves, because nothing more is to be submitted."""


_PATIENT: Final = frozenset({"credits", "max_credits"})
"""After these, what runs is waited for however long it takes."""


@define(eq=False)
class _Job:
    """One item on its way through this run.

    Attributes:
        phase: ``waiting`` until its submit is about to be recorded, ``recording``,
            ``sent`` once its POST may leave, ``answered`` when its task is known.
    """

    item: Item
    key: str | None
    phase: str = "waiting"
    state: str = ""


@define(eq=False, kw_only=True)
class Run:
    """One run of a batch: a pump that starts items while there is room, and their lives."""

    session: Session
    ledger: Ledger
    folder: Path
    options: Options
    counts: Counts
    progress: Callable[[BatchProgress], None] | None
    stop: Stop | None = field(default=None, init=False)
    crash: BaseException | None = field(default=None, init=False)
    _states: dict[str, int] = field(init=False)
    _money: Money = field(init=False)
    _clock: Clock = field(init=False)
    _lives: dict[asyncio.Task[None], _Job] = field(factory=dict, init=False)
    _active: set[int] = field(factory=set, init=False)
    _window: set[int] = field(factory=set, init=False)
    _unsent: set[int] = field(factory=set, init=False)
    _saving: set[int] = field(factory=set, init=False)
    _rereading: set[int] = field(factory=set, init=False)
    _downloads: asyncio.Semaphore = field(init=False)
    _changed: asyncio.Event = field(factory=asyncio.Event, init=False)
    _ends: deque[float] = field(factory=lambda: deque(maxlen=64), init=False)
    _requeued: bool = field(default=False, init=False)
    _paused_until: float = field(default=0.0, init=False)
    _accepted_at: float = field(default=0.0, init=False)
    _doubts: int = field(default=0, init=False)
    _welcome: bool = field(default=False, init=False)
    _leave_at: float = field(default=float("inf"), init=False)
    _checked_disk_at: float = field(default=float("-inf"), init=False)
    _new: set[int] = field(factory=set, init=False)
    pictures: int = field(default=0, init=False)
    kept: list[Path] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._clock = self.session.clock
        self._states = dict(self.counts.states)
        self._welcome = bool(self.counts.prices)
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._money = Money.of(self.counts, limit=self.options.max_credits)

    # -- the pump --------------------------------------------------------------------------

    async def go(self, stop: asyncio.Event | None) -> None:
        """Run until everything has ended, or no more can be done."""
        self._paused_until = self._accepted_at = self._clock.now()
        self._report_progress()
        loop = asyncio.get_running_loop()
        helpers = [loop.create_task(self._pump()), loop.create_task(self._verify())]
        for helper in helpers:
            helper.add_done_callback(self._ended)
        others = [loop.create_task(self._keep_telling())]
        if stop is not None:
            others.append(loop.create_task(self._obey(stop)))
        try:
            await self._until_idle(helpers)
        finally:
            left = (*helpers, *others, *self._lives)
            for each in left:
                each.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            self._report_progress()
        if self.crash is not None:
            raise self.crash

    async def _until_idle(self, helpers: list[asyncio.Task[None]]) -> None:
        """Until pump and lives have ended, or time or a failure says to leave."""
        while self._lives or not all(helper.done() for helper in helpers):
            patience = self._leave_at - time.monotonic()
            if self.crash is not None or patience <= 0:
                return
            with contextlib.suppress(TimeoutError):
                timeout = None if patience == float("inf") else patience
                await asyncio.wait_for(self._changed.wait(), timeout)

    async def _pump(self) -> None:
        await self._sweep("submitted", "completed")
        if self.options.resend_uncertain:
            await self._sweep("uncertain")
        while self._going:
            self._requeued = False
            await self._sweep("queued")
            while self._going and (self._unsent or self._rereading) and not self._requeued:
                await self._next_change()
            if not self._requeued:
                return

    async def _sweep(self, *states: str) -> None:
        """Start every item in one of *states*, as room allows."""
        after = (0, 0)
        while page := await self._commit(self.ledger.page(*states, after=after, limit=_PAGE)):
            for item in page:
                after = (item.line, item.number)
                if item.number in self._active:
                    continue
                if not await self._room(item):
                    return
                # The page may be old by now: what was under way when it was read may have ended.
                state = await self._commit(self.ledger.state(item.number))
                if state in states and item.number not in self._active:
                    self._start(item)

    async def _room(self, item: Item) -> bool:
        """Wait until *item* may start; False if it must not."""
        buys = item.state in {"queued", "uncertain"}
        while self._going or (item.state == "completed" and self.crash is None):
            if item.state == "completed":
                if len(self._saving) < _BACKLOG:
                    return not self._disk_trouble
            elif len(self._window) < self._max_in_flight and len(self._saving) < _BACKLOG:
                if not buys:
                    return True
                if self._may_send() and self._may_pay(item) and await self._has_disk():
                    return True
            pause = self._paused_until if self._paused_until > self._clock.now() else None
            if self._going or item.state == "completed":
                await self._next_change(until=float("inf") if pause is None else pause)
        return False

    @property
    def _going(self) -> bool:
        return self.stop is None and self.crash is None

    @property
    def _disk_trouble(self) -> bool:
        return self.stop is not None and self.stop.kind == "disk"

    @property
    def _max_in_flight(self) -> int:
        return self.session.max_in_flight

    def _may_send(self) -> bool:
        # As many as may be in the air, and no more: what a crash leaves behind in state
        # "submitting" is uncertain, and some of it may have been refused and be waiting.
        seats = self.session.max_connections
        return len(self._unsent) < seats and self._clock.now() >= self._paused_until

    def _may_pay(self, item: Item) -> bool:
        if self._money.allows(item):
            return True
        if not self._window:
            self._halt("max_credits", self._why_not(item))
        return False

    def _why_not(self, item: Item) -> str:
        """Why *item* cannot be paid for while nothing is under way that may change that."""
        money = self._money
        if unknown := money.unknown(item):
            return (
                f"the API has not said yet what a result of {printable(item.model, 80)} costs, and "
                f"{unknown} are or may be paid for: another could break the limit of "
                f"{money.limit:g} credits; have uncertain items resent first, or go on without "
                "a limit"
            )
        return (
            f"at most {money.limit:g} credits may be spent, and {money.committed:g} are spent or "
            "may be; raise the limit to go on"
        )

    async def _has_disk(self) -> bool:
        """Whether what is bought could be saved; asked once a second."""
        now = time.monotonic()
        if now - self._checked_disk_at >= 1.0:
            self._checked_disk_at = now
            with hold(self._clock):
                free = (await asyncio.to_thread(shutil.disk_usage, self.folder)).free
            if free < _MIN_FREE:
                self._halt(
                    "disk",
                    f"only {free // 1024**2} MB are left on the disk of {self.folder}; make room "
                    "and run the same batch again",
                )
        return self._going

    def _start(self, item: Item) -> None:
        if item.state == "queued":
            item = evolve(item, times={})  # of what it may have been bought for before
        job = _Job(item, key=item.idempotency_key)
        self._active.add(item.number)
        if item.state in {"queued", "uncertain"}:
            self._money.reserve(item)
            self._unsent.add(item.number)
        elif item.state == "submitted":
            self._money.resume(item)
        if item.state == "completed":
            self._saving.add(item.number)
        else:
            self._window.add(item.number)
        if self._may_buy_anew(item):
            self._rereading.add(item.number)
        life = asyncio.get_running_loop().create_task(self._live(job))
        self._lives[life] = job
        life.add_done_callback(self._ended)

    def _may_buy_anew(self, item: Item) -> bool:
        """Whether it is to be submitted again if its task or its results are still lost."""
        lost = {"submitted": NOT_FOUND, "completed": EXPIRED}.get(item.state)
        return self.options.resubmit_expired and lost is not None and item.code == lost

    @property
    def _places(self) -> tuple[set[int], ...]:
        return self._active, self._window, self._unsent, self._saving, self._rereading

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A life, the pump or the verification has ended, perhaps by a failure of ours."""
        job = self._lives.pop(task, None)
        if job is not None:
            number = job.item.number
            if number in self._rereading and job.state == "queued":
                self._requeued = True
            for numbers in self._places:
                numbers.discard(number)
            if job.phase == "waiting" and not _is_paid(job.item):
                self._money.withdraw(job.item)
        exc = None if task.cancelled() else task.exception()
        if exc is not None and self.crash is None:
            if isinstance(exc, OSError) and not isinstance(exc, EvolinkError):
                self._lose(exc)
            else:
                self.crash = exc
        self._notify()

    # -- stopping --------------------------------------------------------------------------

    async def _obey(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._halt("interrupted", "it was interrupted; run the same batch again to go on")

    def _halt(self, kind: str, message: str) -> None:
        """Submit no more; what has not left is taken back, what runs is given its time."""
        harder = self.stop is None or (self.stop.kind in _PATIENT and kind not in _PATIENT)
        if not harder:
            return
        self.stop = Stop(kind=kind, message=message)
        if kind not in _PATIENT:
            self._leave_at = time.monotonic() + self.options.grace
        for life, job in self._lives.items():
            if job.item.number in self._unsent and job.phase == "waiting":
                life.cancel()
        self._notify()
        self._report_progress()

    def _lose(self, exc: OSError) -> None:
        """A file or the folder is not what it was a moment ago."""
        self._halt(
            "disk",
            f"the folder {self.folder} cannot be used any more: {exc.strerror or exc}; see to "
            "that, then run the same batch again",
        )

    def _outage(self, item: Item, exc: EvolinkError) -> None:
        """The API takes no submits: pause, and after long enough stop."""
        now = self._clock.now()
        if now - self._accepted_at >= self.options.patience:
            self._halt("network", f"the API takes no submits: {exc}; run the same batch again")
        after = exc.retry_after if isinstance(exc, APIStatusError) else None
        # One warning for all that are put off by the same trouble.
        level = logging.WARNING if now >= self._paused_until else logging.DEBUG
        self._paused_until = max(self._paused_until, now + max(_OUTAGE_PAUSE, after or 0.0))
        logger.log(level, "submits are put off, that of %s first: %s", item.place, exc)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _next_change(self, *, until: float = float("inf")) -> None:
        changed = self._changed
        if until == float("inf"):
            await changed.wait()
            return
        loop = asyncio.get_running_loop()
        racers = {
            loop.create_task(changed.wait()),
            loop.create_task(_slept(self._clock, until)),
        }
        try:
            await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for racer in racers:
                racer.cancel()
            await asyncio.gather(*racers, return_exceptions=True)

    async def _commit(self, change: Awaitable[T]) -> T:
        """Await the ledger; a clock that can be held does not run meanwhile."""
        with hold(self._clock):
            return await change

    # -- the life of an item ---------------------------------------------------------------

    async def _live(self, job: _Job) -> None:
        item = job.item
        if item.state == "completed":
            await self._save(job, GenerationResult.from_json(item.snapshot), again=True)
            return
        task = await self._submit(job) if item.state != "submitted" else self._task_of(item)
        self._unsent.discard(item.number)
        if task is None:
            return
        result = await self._result(job, task)
        if result is not None:
            self._settle(item, result.usage.credits_used)
        self._window.discard(item.number)
        self._notify()
        if result is not None:
            self._saving.add(item.number)
            await self._save(job, result, again=False)

    def _task_of(self, item: Item) -> Task:
        if item.task_id is None:  # pragma: no cover - committed together with the state
            raise AssertionError(item.number)
        return self.session.task(item.task_id)

    async def _submit(self, job: _Job) -> Task | None:
        """Submit it and record what became of that; None if no task did."""
        item = job.item
        resent = item.state == "uncertain"
        try:
            task = await self.session.submit(
                as_request(item.request),
                idempotency_key=item.idempotency_key if resent else None,
                before_send=partial(self._before_send, job),
            )
        except asyncio.CancelledError:
            await self._take_back(job)
            raise
        except SubmitUncertainError as exc:
            why = str(exc.__cause__ or "no usable answer came")
            await self._doubt(job, exc.idempotency_key, why)
            self._count_doubt(exc)
            return None
        except _HaltedError:
            await self._return(job)
            return None
        except LedgerError as exc:
            # Before a POST left; an earlier one was refused, or this would be an uncertain submit.
            self._halt("disk", str(exc))
            await self._return(job)
            return None
        except EvolinkError as exc:
            await self._refused(job, exc)
            return None
        job.phase = "answered"
        await self._accepted(job, task)
        return task

    async def _before_send(self, job: _Job, key: str) -> None:
        """The write-ahead: from here on a crash means that the submit may have been accepted."""
        if not self._going:
            raise _HaltedError
        job.phase, job.key = "recording", key
        await self._commit(self.ledger.submitting(job.item.number, key))
        job.phase = "sent"
        self._moved(job, "submitting")

    async def _take_back(self, job: _Job) -> None:
        """Cancelled: say what is sure about its submit."""
        if job.phase == "waiting":
            return
        if job.key not in self.session.unsent:  # a POST of it may have been accepted
            await self._doubt(job, job.key, "the batch was left while this was being submitted")
        else:
            await self._return(job)

    async def _return(self, job: _Job) -> None:
        """Nothing of it was accepted now: as it was before."""
        item = job.item
        if item.state == "uncertain":
            await self._doubt(job, job.key, item.message or "")
            return
        self._money.release(item, 0.0)
        if job.phase != "waiting":
            await self._commit(self.ledger.queued(item.number))
            self._moved(job, "queued")

    async def _doubt(self, job: _Job, key: str | None, why: str) -> None:
        item = job.item
        self._money.doubt(item)
        await self._commit(self.ledger.uncertain(item.number, key=key, message=printable(why)))
        self._moved(job, "uncertain")

    def _count_doubt(self, exc: SubmitUncertainError) -> None:
        self._doubts += 1
        if self._doubts >= _DOUBTS:
            self._halt(
                "network",
                f"{self._doubts} submits in a row may or may not have been accepted, the last "
                f"because: {exc.__cause__ or 'no answer came'}; see what is wrong before you go on",
            )

    async def _accepted(self, job: _Job, task: Task) -> None:
        item = job.item
        reserved = task.snapshot.usage.credits_reserved if task.snapshot is not None else None
        self._accepted_at = self._clock.now()
        self._doubts = 0
        self._welcome = True
        self._money.learn(item, reserved)
        try:
            await self._commit(
                self.ledger.submitted(
                    item.number, key=task.idempotency_key, task_id=task.id, reserved=reserved
                )
            )
        except LedgerError as exc:
            exc.add_note(
                f"{item.place} was accepted as task {task.id} (idempotency key "
                f"{task.idempotency_key}), which could not be recorded"
            )
            raise
        self._moved(job, "submitted")

    async def _refused(self, job: _Job, exc: EvolinkError) -> None:
        """Surely not accepted: it goes back, or it has failed for good."""
        item = job.item
        if isinstance(exc, AuthenticationError):
            await self._return(job)
            self._halt("authentication", f"the API refuses the key: {exc}")
        elif isinstance(exc, InsufficientCreditsError):
            await self._return(job)
            self._halt("credits", f"nothing is left to spend: {exc}")
        elif isinstance(exc, SessionClosedError):
            await self._return(job)
            self._halt("closed", "the session was closed; run the same batch again to go on")
        elif isinstance(exc, RateLimitError | ServerError | APIConnectionError):
            await self._return(job)
            self._requeued = True
            self._outage(item, exc)
        elif isinstance(exc, PermissionDeniedError | NotFoundError) and not self._welcome:
            await self._return(job)
            self._halt(
                "refused",
                f"the API has accepted nothing yet, and refuses {item.place}: {exc}; see that "
                "the base URL is right and the key may use this model, or change that line",
            )
        elif item.state == "uncertain":
            # A repeat that is refused says nothing about the first.
            await self._doubt(job, job.key, f"submitting it again was refused: {exc}")
        else:
            status = f"http_{exc.status}" if isinstance(exc, APIStatusError) else "refused"
            code = exc.code if isinstance(exc, APIStatusError) and exc.code else status
            await self._fail(
                job,
                code=status if code.isdigit() else code,
                message=str(exc),
                # About the account or the model, not about this request.
                retryable=isinstance(exc, PermissionDeniedError | NotFoundError),
            )

    async def _result(self, job: _Job, task: Task) -> GenerationResult | None:
        """What its task came to; None if there is nothing to save, or not yet."""
        try:
            result = await task
        except TaskFailedError as exc:
            used = exc.snapshot.usage.credits_used if exc.snapshot is not None else None
            await self._fail(
                job, code=exc.code, message=exc.reason, retryable=exc.retryable, used=used
            )
        except TaskCancelledError as exc:
            await self._fail(job, code="request_cancelled", message=str(exc))
        except NotFoundError:
            await self._give_up(
                job,
                NOT_FOUND,
                f"the API does not know task {task.id} any more; its results can no longer be "
                "had; submitting it again pays again",
            )
        except AuthenticationError as exc:
            self._halt("authentication", f"the API refuses the key: {exc}")
        except SessionClosedError:
            self._halt("closed", "the session was closed; run the same batch again to go on")
        except TaskTimeoutError:
            logger.warning(
                "%s is left running: task %s has not ended in time", job.item.place, task.id
            )
        except EvolinkError as exc:
            logger.warning("%s is left as it is: %s", job.item.place, exc)
        else:
            if result.urls:
                return result
            await self._fail(
                job,
                code="no_results",
                message=f"task {task.id} completed without results",
                charged=True,
                used=result.usage.credits_used,
            )
        return None

    async def _fail(
        self,
        job: _Job,
        *,
        code: str,
        message: str,
        retryable: bool = False,
        used: float | None = None,
        charged: bool = False,
    ) -> None:
        if charged and used is None:
            self._money.keep(job.item)
        else:
            self._money.release(job.item, used or 0.0)
        await self._commit(
            self.ledger.failed(
                job.item.number,
                code=printable(code, 80),
                message=printable(message, 500),
                retryable=retryable,
                used=used,
                guess=self._money.guess(job.item) if charged else None,
            )
        )
        self._moved(job, "failed")

    # -- saving ----------------------------------------------------------------------------

    async def _save(self, job: _Job, result: GenerationResult, *, again: bool) -> None:
        """Download, check, record; *again*: an earlier run may have begun to."""
        item = job.item
        used = result.usage.credits_used
        stem = await self._commit(
            self.ledger.completed(
                item.number,
                snapshot=json.dumps(result.to_json()),
                used=used,
                stems=stems(item, self.folder, len(result.urls)),
            )
        )
        self._moved(job, "completed")
        async with self._downloads:
            if self._disk_trouble:
                return
            try:
                await self._fetch(job, result, stem, again=again)
            except SessionClosedError:
                self._halt("closed", "the session was closed; run the same batch again to go on")

    def _settle(self, item: Item, used: float | None) -> None:
        """It is paid for; where nobody says how much, a limit could not be kept."""
        money = self._money
        money.learn(item, used)
        money.keep(item)
        if money.limit is not None and item.model not in money.prices:
            self._halt(
                "max_credits",
                f"the API does not say what {printable(item.model, 80)} costs, so no limit can be "
                "kept; go on without a limit if you want to",
            )

    async def _fetch(self, job: _Job, result: GenerationResult, stem: str, *, again: bool) -> None:
        item = job.item
        old = _is_old(item, result)
        try:
            paths = await self._download(item, result, stem, retry_expired=not old)
        except DownloadError as exc:
            if (why := disk_error(exc)) is not None:
                self._halt("disk", f"{exc}; {why}, then run the same batch again")
                return
            why = f"{exc.url}: the host answered {exc.status}" if exc.expired else str(exc)
            await self._keep_part(item, exc.saved, why)
            now, forgotten = await self._read_again(item, result) if again else (result, False)
            if now is not None and now.urls != result.urls:
                await self._fetch(job, now, stem, again=False)
            elif now is not None and (old or (forgotten and exc.expired)):
                await self._expire(job, result, stem, why)
            else:
                logger.warning("%s is not saved yet: %s", item.place, why)
        else:
            await self._saved(job, paths)

    async def _download(
        self, item: Item, result: GenerationResult, stem: str, *, retry_expired: bool
    ) -> tuple[Path, ...]:
        """Its files: those that are there as they were saved, and the others anew."""
        with hold(self._clock):
            recorded = await self.ledger.files(item.number)
            files = await asyncio.to_thread(present, self.folder, recorded.values())
        return await save_result(
            self.session,
            result,
            self.folder,
            stem=stem,
            existing={k: self.folder / file.name for k, file in recorded.items() if file in files},
            overwrite=True,
            before_rename=self._make_way,
            retry_expired=retry_expired,
        )

    def _make_way(self, new: Path, target: Path) -> None:
        """Keep what has the name of a picture, and is not that picture, under another name."""
        kept = kept_from(new, target)
        if kept is not None:
            self.kept.append(kept)
            logger.warning("%s is not what was saved there: kept as %s", target.name, kept.name)

    async def _saved(self, job: _Job, paths: tuple[Path, ...]) -> None:
        self._new.add(job.item.number)  # before others can read of it in the ledger
        with hold(self._clock):
            files = await asyncio.to_thread(lambda: [file_of(path) for path in paths])
            await self.ledger.saved(job.item.number, files)
        self.pictures += len(files)
        self._moved(job, "saved")

    async def _keep_part(self, item: Item, paths: tuple[Path, ...], why: str) -> None:
        """Record what there is of its files, and why there is no more."""
        with hold(self._clock):
            files = await asyncio.to_thread(_by_position, paths)
            await self.ledger.unsaved(item.number, files, printable(why, 500))

    async def _read_again(
        self, item: Item, result: GenerationResult
    ) -> tuple[GenerationResult | None, bool]:
        """The result as the API gives it now, perhaps with other links; None if it cannot say.

        And whether it knows nothing of the task any more.
        """
        try:
            now = await read_once(self.session, result.task_id)
        except EvolinkError as exc:
            if isinstance(exc, NotFoundError):
                return result, exc.from_api
            logger.warning("%s: its task cannot be read: %s", item.place, exc)
            return None, False
        return (GenerationResult.from_snapshot(now) if now.urls else result), False

    async def _expire(self, job: _Job, result: GenerationResult, stem: str, why: str) -> None:
        """Its links have had their time, or nobody knows them: what is not on disk is lost."""
        item = job.item
        with hold(self._clock):
            recorded = await self.ledger.files(item.number)
            paths = await asyncio.to_thread(whole, self.folder, stem, result, recorded)
            trouble = await asyncio.to_thread(trouble_with, self.folder, recorded.values())
        if paths:  # only the record was missing
            await self._saved(job, paths)
            return
        await self._give_up(
            job,
            EXPIRED,
            f"{trouble and trouble + ', and '}the links to its results have expired (they live "
            f"24 hours; {printable(why, 200)}); submitting it again pays again",
        )

    async def _give_up(self, job: _Job, code: str, message: str) -> None:
        """What was paid for cannot be had any more: lost, or, if so wanted, to be bought again."""
        await self._fail(job, code=code, message=message, charged=True)
        if self._may_buy_anew(job.item) and self._going:
            await self._commit(self.ledger.replacing(job.item.number))
            self._moved(job, "queued")

    async def _verify(self) -> None:
        """Download again what an earlier run saved and is not there any more, or has changed."""
        after = (0, 0)
        while page := await self._commit(self.ledger.page("saved", after=after, limit=_PAGE)):
            for item in page:
                after = (item.line, item.number)
                if item.number in self._new:
                    continue
                with hold(self._clock):
                    trouble = await asyncio.to_thread(trouble_with, self.folder, item.files)
                    if not trouble:
                        continue
                    await self.ledger.damaged(item.number)
                logger.info("%s: %s: downloaded again", item.place, trouble)
                damaged = evolve(item, state="completed")
                self._moved(_Job(item, key=None), "completed")
                if await self._room(damaged) and item.number not in self._active:
                    self._start(damaged)

    # -- telling ---------------------------------------------------------------------------

    def _moved(self, job: _Job, state: str) -> None:
        before = job.state or job.item.state
        job.state = state
        self._states[before] = self._states.get(before, 0) - 1
        self._states[state] = self._states.get(state, 0) + 1
        if state in {"saved", "failed", "uncertain"}:
            self._ends.append(time.monotonic())
        self._notify()
        self._report_progress()

    async def _keep_telling(self) -> None:
        """Rate and time left change while nothing else does."""
        while self.progress is not None:
            await asyncio.sleep(_TELL_EVERY)
            self._report_progress()

    def _report_progress(self) -> None:
        if self.progress is None:
            return
        try:
            self.progress(self._now())
        except Exception as exc:
            # Noted where it is sure whose it is: an OSError of it says nothing of the folder.
            self.crash = self.crash or exc
            self._notify()
            raise

    def _now(self) -> BatchProgress:
        states = self._states
        running = states.get("submitting", 0) + states.get("submitted", 0)
        left = running + states.get("completed", 0) + states.get("queued", 0)
        rate = self._rate()
        return BatchProgress(
            total=sum(states.values()),
            queued=states.get("queued", 0),
            running=running,
            completed=states.get("completed", 0),
            saved=states.get("saved", 0),
            failed=states.get("failed", 0),
            uncertain=states.get("uncertain", 0),
            credits=self._money.credits,
            credits_in_doubt=self._money.in_doubt,
            rate=rate,
            seconds_left=left / rate if rate else None,
            stopping=self.stop.message if self.stop is not None else None,
        )

    def _rate(self) -> float | None:
        """Items ended per second, over the last 64 of them."""
        if len(self._ends) < 8 or (span := time.monotonic() - self._ends[0]) <= 0:
            return None
        return (len(self._ends) - 1) / span


def _is_paid(item: Item) -> bool:
    """False if going on with *item* may buy something."""
    return item.state not in {"queued", "uncertain"}


def _is_old(item: Item, result: GenerationResult) -> bool:
    """Whether its links have had their time. By this machine's clock alone; if in doubt, no."""
    ended = item.times.get("completed", float("inf"))
    if "submitted" in item.times and result.duration is not None:
        ended = min(ended, item.times["submitted"] + max(0.0, result.duration))
    return time.time() - ended >= _LINKS_LIVE


def _by_position(paths: tuple[Path, ...]) -> dict[int, File]:
    """The files of a result by the number in their name."""
    return {int(path.stem.rpartition("-")[2]): file_of(path) for path in paths}


async def _slept(clock: Clock, until: float) -> None:
    await clock.sleep_until(until)
