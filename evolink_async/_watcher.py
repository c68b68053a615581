"""One background loop per session that watches every running task.

A heap of due times, readings filled with the tasks due earliest, and the only place where
the state of a task changes. It knows the network only as ``fetch(ids) -> Reading``.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from attrs import define, field

from evolink_async._clock import Clock
from evolink_async._models import RUNNING, ImageRequest, RawRequest, TaskSnapshot
from evolink_async._polling import PollPolicy
from evolink_async._protocol import rule_of
from evolink_async._text import printable
from evolink_async.errors import (
    APIStatusError,
    AuthenticationError,
    EvolinkError,
    NotFoundError,
    PermissionDeniedError,
    TaskTimeoutError,
)

__all__ = ["Watch", "Watcher"]

logger = logging.getLogger(__name__)

_REPLICA_LAG: Final = 60.0
"""Seconds after our own submit in which a 404 may only mean that a replica is behind."""
_STRIKE_GAP: Final = 5.0
"""Seconds that must lie between two refusals for the second to count."""
_STRIKES: Final = 2
_OTHER_STRIKES: Final = 3


class _Reading(Protocol):
    @property
    def sent_at(self) -> float: ...
    @property
    def answers(self) -> Mapping[str, TaskSnapshot | EvolinkError | None]: ...
    @property
    def single(self) -> bool: ...


class _Reader(Protocol):
    """What the watcher needs of a transport."""

    @property
    def read_limit(self) -> int: ...
    async def fetch(self, ids: tuple[str, ...]) -> _Reading: ...


_Futures = list["asyncio.Future[None]"]
_Entry = tuple[float, int, "Watch"]


@define(eq=False)
class Watch:
    """One task under watch, from its submit (or `Session.task`) to its end.

    Attributes:
        id: The task's id.
        request: What was submitted, None if it was not this session that did.
        idempotency_key: The key it was submitted with.
        snapshot: What was last read, None before the first answer.
        reason: Why it was given up before a terminal state; None if it was not.
        ended: True once nothing more will be read.
    """

    id: str
    started: float
    deadline: float
    request: ImageRequest | RawRequest | None = None
    idempotency_key: str | None = None
    snapshot: TaskSnapshot | None = None
    estimate: float | None = None
    reason: EvolinkError | None = None
    on_end: Callable[[], None] | None = None
    ended: bool = False
    reading: bool = False
    again: bool = False
    when: float = 0.0
    failures: int = 0
    strikes: int = 0
    struck_at: float = 0.0
    struck_by: type[EvolinkError] | None = None
    waiters: _Futures | None = None
    listeners: _Futures | None = None
    lookers: _Futures | None = None
    last_error: EvolinkError | None = field(default=None)


class Watcher:
    """Watches tasks until each has ended."""

    def __init__(
        self,
        reader: _Reader,
        *,
        clock: Clock,
        policy: PollPolicy,
        retry_wait: Callable[[int], float],
        closed_until: Callable[[], float],
        max_reads: int,
    ) -> None:
        """A watcher on the running loop.

        Args:
            reader: Where tasks are read.
            clock: The session's clock.
            policy: When to look.
            retry_wait: Seconds to wait after so many failed reads in a row.
            closed_until: When the session-wide cool-down ends.
            max_reads: Readings in the air at once.
        """
        self._reader = reader
        self._clock = clock
        self._policy = policy
        self._retry_wait = retry_wait
        self._closed_until = closed_until
        self._max_reads = max_reads
        self._live: dict[str, Watch] = {}
        self._heap: list[_Entry] = []
        self._order = itertools.count()
        self._wake = asyncio.Event()
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = float("inf")
        self._loop: asyncio.Task[None] | None = None
        self._readings: set[asyncio.Task[None]] = set()
        self._unknown_words: set[str] = set()

    # -- what sessions and tasks ask -------------------------------------------------------

    @property
    def watches(self) -> tuple[Watch, ...]:
        """What is watched now, oldest first."""
        return tuple(self._live.values())

    def submitted(
        self,
        snapshot: TaskSnapshot,
        *,
        started: float,
        request: ImageRequest | RawRequest,
        idempotency_key: str,
        on_end: Callable[[], None],
    ) -> Watch:
        """Watch a task this session has just submitted; *on_end* is called once it has ended."""
        watch = self._live.get(snapshot.id)
        if watch is not None:  # an idempotent repeat of a submit whose task is watched already
            on_end()
            return watch
        watch = Watch(
            snapshot.id,
            started=started,
            deadline=self._deadline(started),
            request=request,
            idempotency_key=idempotency_key,
            snapshot=snapshot,
            estimate=snapshot.estimated_time,
            on_end=on_end,
        )
        if snapshot.is_terminal:
            self._end(watch)
            return watch
        self._live[watch.id] = watch
        self._schedule(watch, started + self._policy.next_age(0.0, watch.estimate))
        self._start()
        return watch

    def attach(self, task_id: str) -> Watch:
        """Watch a task by its id, looking at once; two callers share one watch."""
        watch = self._live.get(task_id)
        if watch is None:
            now = self._clock.now()
            watch = Watch(task_id, started=now, deadline=self._deadline(now))
            self._live[task_id] = watch
            self._schedule(watch, now)
            self._start()
        return watch

    def find(self, task_id: str) -> Watch | None:
        """The live watch of a task, if it is watched."""
        return self._live.get(task_id)

    def nudge(self, task_id: str) -> bool:
        """Look at a task now; False if it is not watched."""
        watch = self._live.get(task_id)
        if watch is None:
            return False
        if watch.reading:
            watch.again = True
        else:
            self._schedule(watch, self._clock.now())
        return True

    async def until_ended(self, watch: Watch) -> None:
        """Return once *watch* has ended."""
        if not watch.ended:
            watch.waiters = watch.waiters or []
            await _wait_in(watch.waiters)

    async def until_changed(self, watch: Watch) -> None:
        """Return at the next change of status or progress, or the end."""
        if not watch.ended:
            watch.listeners = watch.listeners or []
            await _wait_in(watch.listeners)

    async def look(self, watch: Watch) -> None:
        """Read *watch* now and return once an answer to this read is in.

        Raises:
            EvolinkError: That read failed.
        """
        if watch.ended:
            return
        watch.lookers = watch.lookers or []
        self.nudge(watch.id)
        await _wait_in(watch.lookers)

    async def stop(self, reason: Callable[[str], EvolinkError]) -> tuple[str, ...]:
        """End every watch with ``reason(task_id)``; returns the ids that were running."""
        pending = [t for t in (self._loop, self._alarm, *self._readings) if t is not None]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        running = tuple(self._live)
        for watch in self.watches:
            self._end(watch, reason(watch.id))
        return running

    # -- the loop --------------------------------------------------------------------------

    def _deadline(self, started: float) -> float:
        patience = self._policy.deadline
        return float("inf") if patience is None else started + patience

    def _schedule(self, watch: Watch, due: float) -> None:
        """Look at *watch* at *due*; once more shortly before the deadline, never after it."""
        if due >= watch.deadline:
            last = watch.deadline - self._policy.min_interval
            due = last if last > self._clock.now() else watch.deadline
        watch.when = due
        if due == float("inf"):
            return
        heapq.heappush(self._heap, (due, next(self._order), watch))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._compact()
        if due < self._alarm_at:
            self._wake.set()

    def _compact(self) -> None:
        """Drop the entries of ended and moved watches, which would keep them in memory."""
        self._heap = [entry for entry in self._heap if not _is_stale(entry)]
        heapq.heapify(self._heap)

    def _start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._run())
            self._loop.add_done_callback(self._loop_ended)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = self._clock.now()
            at = self._next_due()
            if at <= now:
                self._start_reading(now)
            else:
                self._set_alarm(at)
                await self._wake.wait()

    def _next_due(self) -> float:
        """When the loop has something to do, infinity if only others can say."""
        while self._heap and _is_stale(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap:
            return float("inf")
        due, _, watch = self._heap[0]
        if due >= watch.deadline:
            return watch.deadline
        if len(self._readings) >= self._max_reads:
            return float("inf")
        return max(due, self._closed_until())

    def _start_reading(self, now: float) -> None:
        batch = self._take(now)
        if not batch:
            return
        task = asyncio.get_running_loop().create_task(self._read(batch))
        self._readings.add(task)
        task.add_done_callback(self._reading_ended)

    def _take(self, now: float) -> list[Watch]:
        """The tasks due earliest, at most as many as one reading can ask for."""
        batch: list[Watch] = []
        while self._heap and len(batch) < self._reader.read_limit:
            entry = self._heap[0]
            if not _is_stale(entry):
                due, _, watch = entry
                if due > now:
                    break
                if now >= watch.deadline:
                    self._give_up(watch)
                else:
                    batch.append(watch)
            heapq.heappop(self._heap)
        for watch in batch:
            watch.reading = True
            self._schedule(watch, watch.deadline)
        return batch

    async def _read(self, batch: list[Watch]) -> None:
        reading = await self._reader.fetch(tuple(watch.id for watch in batch))
        for watch in batch:
            if not watch.ended:
                self._apply(watch, reading)

    def _apply(self, watch: Watch, reading: _Reading) -> None:
        watch.reading = False
        answer = reading.answers.get(watch.id)
        if isinstance(answer, TaskSnapshot):
            watch.last_error = None
            self._store(watch, answer, reading.sent_at)
        elif answer is not None:
            watch.last_error = answer
            self._failed(watch, answer, reading)
        if not watch.ended and watch.again:
            watch.again = False
            self._schedule(watch, self._clock.now())
            return
        _wake_all(watch.lookers)
        watch.lookers = None

    def _store(self, watch: Watch, snapshot: TaskSnapshot, sent_at: float) -> None:
        before, watch.snapshot = watch.snapshot, snapshot
        watch.failures = watch.strikes = 0
        if snapshot.is_terminal:
            self._end(watch)
            return
        if snapshot.status not in RUNNING:
            self._log_unknown(snapshot.status)
        if watch.estimate is None:
            watch.estimate = snapshot.estimated_time
        logger.debug(
            "task %s is %s at %s %%", watch.id, printable(snapshot.status, 60), snapshot.progress
        )
        self._schedule(
            watch, watch.started + self._policy.next_age(sent_at - watch.started, watch.estimate)
        )
        if (
            before is None
            or before.status != snapshot.status
            or before.progress != snapshot.progress
        ):
            _wake_all(watch.listeners)
            watch.listeners = None

    def _log_unknown(self, status: str) -> None:
        if status not in self._unknown_words and len(self._unknown_words) < 100:
            self._unknown_words.add(status)
            logger.warning("unknown task status %s: treated as running", printable(status, 60))

    # -- failed reads ----------------------------------------------------------------------

    def _failed(self, watch: Watch, error: EvolinkError, reading: _Reading) -> None:
        """A failed read is no information; only a repeated, final refusal ends the watch."""
        now = self._clock.now()
        if reading.single and self._strike(watch, error, now):
            self._end(watch, error)
            return
        watch.failures += 1
        wait = self._retry_wait(watch.failures)
        logger.debug("reading task %s failed, again in %.1f s: %s", watch.id, wait, error)
        self._schedule(watch, now + max(wait, self._policy.min_interval))

    def _strike(self, watch: Watch, error: EvolinkError, now: float) -> bool:
        """Note a refusal; True if it was the last that was needed."""
        final = isinstance(error, APIStatusError) and error.from_api and not rule_of(error)[0]
        if not final:
            return False
        kind = type(error)
        missing = isinstance(error, NotFoundError)
        if missing and watch.request is not None and now - watch.started < _REPLICA_LAG:
            return False
        if kind is not watch.struck_by or watch.strikes == 0:
            watch.struck_by, watch.strikes, watch.struck_at = kind, 1, now
            return False
        if missing and now - watch.struck_at < _STRIKE_GAP:
            return False
        watch.strikes += 1
        few = isinstance(error, NotFoundError | AuthenticationError | PermissionDeniedError)
        return watch.strikes >= (_STRIKES if few else _OTHER_STRIKES)

    # -- ends ------------------------------------------------------------------------------

    def _give_up(self, watch: Watch) -> None:
        seconds = watch.deadline - watch.started
        last = f"; the last read failed: {watch.last_error}" if watch.last_error else ""
        self._end(
            watch,
            TaskTimeoutError(
                f"task {watch.id} did not end within {seconds:g} s (PollPolicy.deadline){last}. "
                f"It may still be running: session.task({watch.id!r}) picks it up again",
                task_id=watch.id,
                snapshot=watch.snapshot,
            ),
        )

    def _end(self, watch: Watch, reason: EvolinkError | None = None) -> None:
        watch.ended, watch.reason = True, reason
        if self._live.get(watch.id) is watch:
            del self._live[watch.id]
        if watch.snapshot is not None and reason is None:
            logger.debug("task %s ended: %s", watch.id, watch.snapshot.status)
        for futures in (watch.waiters, watch.listeners, watch.lookers):
            _wake_all(futures)
        watch.waiters = watch.listeners = watch.lookers = None
        if watch.on_end is not None:
            watch.on_end()
            watch.on_end = None

    def _reading_ended(self, task: asyncio.Task[None]) -> None:
        self._readings.discard(task)
        self._wake.set()
        self._check(task)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        self._loop = None
        self._check(task)

    def _check(self, task: asyncio.Task[None]) -> None:
        """An unexpected error reaches every waiter: it must not die silently."""
        if task.cancelled() or (crash := task.exception()) is None:
            return
        logger.error("the watcher failed", exc_info=crash)
        for watch in self.watches:
            reason = EvolinkError(
                f"watching task {watch.id} stopped by an internal error ({crash!r}); "
                f"the task goes on: session.task({watch.id!r}) picks it up again"
            )
            reason.__cause__ = crash
            self._end(watch, reason)

    # -- the alarm -------------------------------------------------------------------------

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None and not self._alarm.done():
            if self._alarm_at <= at:
                return  # rings early at worst, and the loop looks again
            self._alarm.cancel()
        self._alarm_at = at
        if at != float("inf"):
            self._alarm = asyncio.get_running_loop().create_task(self._ring(at))
            self._alarm.add_done_callback(self._check)

    async def _ring(self, at: float) -> None:
        await self._clock.sleep_until(at)
        self._wake.set()


async def _wait_in(futures: _Futures) -> None:
    """Wait among *futures*; a cancelled waiter leaves no trace."""
    future = asyncio.get_running_loop().create_future()
    futures.append(future)
    try:
        await future
    finally:
        if future in futures:
            futures.remove(future)


def _wake_all(futures: _Futures | None) -> None:
    for future in futures or ():
        if not future.done():
            future.set_result(None)


def _is_stale(entry: _Entry) -> bool:
    """True for a heap entry whose watch has ended or has been given another time."""
    due, _, watch = entry
    return watch.ended or due != watch.when
