"""One background loop per session that watches every running task.

A heap of due times, readings filled with the tasks due earliest, and the only place where
the state of a task changes. It knows the network only as ``fetch(ids) -> Reading``.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from attrs import define

from evolink_async._clock import Clock, LoopClock
from evolink_async._models import RUNNING, TERMINAL, ImageRequest, RawRequest, TaskSnapshot
from evolink_async._polling import Pacer, PollPolicy, Schedule
from evolink_async._protocol import rule_of
from evolink_async._text import printable
from evolink_async.errors import (
    APIConnectionError,
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
_SUSPENDED: Final = 30.0
"""Seconds the time of day must run ahead of the clock to mean that the machine slept."""
_ATTACHED: Final = "attached"
"""The kind of tasks found by their id, of which nothing else is known."""
_SENTINELS: Final = 128
"""One in so many tasks with a callback is looked at as if it had none."""
_ONE_MISSED: Final = 0.3
"""Share of missed callbacks from which looking for them is like looking without them."""
_READING: Final = -1.0
_ENDED: Final = -2.0
"""In place of a due time: a read is in the air; nothing more will be read."""


class _Reading(Protocol):
    @property
    def sent_at(self) -> float: ...
    @property
    def received_at(self) -> float: ...
    @property
    def answers(self) -> Mapping[str, TaskSnapshot | EvolinkError | None]: ...
    @property
    def single(self) -> bool: ...


class _Reader(Protocol):
    """What the watcher needs of a transport."""

    @property
    def read_limit(self) -> int: ...
    async def fetch(self, ids: tuple[str, ...]) -> _Reading: ...
    def wait_after(self, failures: int, error: EvolinkError) -> float: ...
    def renew(self) -> None: ...


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
    schedule: Schedule
    request: ImageRequest | RawRequest | None = None
    idempotency_key: str | None = None
    snapshot: TaskSnapshot | None = None
    reason: EvolinkError | None = None
    on_end: Callable[[], None] | None = None
    ended: bool = False
    # When it is looked at next, and has last been; both on the session's clock.
    due: float = 0.0
    looked: float = 0.0
    looks: int = 0
    again: bool = False
    alone: bool = False
    # Told to have ended; told so while a read was in the air.
    nudged: bool = False
    called: bool = False
    calls_back: bool = False
    # Looked at like any other although it calls back, to notice callbacks that stop.
    sentinel: bool = False
    trouble: Trouble | None = None
    waiters: _Futures | None = None
    listeners: _Futures | None = None
    lookers: _Futures | None = None

    @property
    def last_error(self) -> EvolinkError | None:
        """Why the last read failed, None if it did not."""
        return self.trouble.error if self.trouble is not None else None


@define
class Trouble:
    """Failed reads of one task in a row.

    Attributes:
        error: The last one.
        failures: How many.
        strikes: How many of them were the same final refusal.
        struck_at: When the first of these was.
    """

    error: EvolinkError
    failures: int = 0
    strikes: int = 0
    struck_at: float = 0.0


class Watcher:
    """Watches tasks until each has ended."""

    def __init__(
        self,
        reader: _Reader,
        *,
        clock: Clock,
        policy: PollPolicy,
        ready_at: Callable[[], float],
        max_reads: int,
        wall: Callable[[], float] | None = None,
    ) -> None:
        """A watcher on the running loop.

        Args:
            reader: Where tasks are read.
            clock: The session's clock.
            policy: When to look.
            ready_at: When cool-down and rate allow the next request.
            max_reads: Readings in the air at once.
            wall: The time of day in seconds, to notice that the machine was suspended;
                None not to.
        """
        self._reader = reader
        self._clock = clock
        self._policy = policy
        self._pacer = Pacer(policy)
        self._ready_at = ready_at
        self._max_reads = max_reads
        self._live: dict[str, Watch] = {}
        # Due times: of tasks that share readings, and of those that must be read singly.
        self._shared: list[_Entry] = []
        self._single: list[_Entry] = []
        self._order = itertools.count()
        self._wake = asyncio.Event()
        self._alarm = Alarm(clock, self._wake.set, self._crash)
        self._loop: asyncio.Task[None] | None = None
        # Readings in the air: what they ask for, and the first deadline among it.
        self._readings: dict[asyncio.Task[None], tuple[list[Watch], float]] = {}
        self._calling_back = 0
        self._priced_anew = -math.inf
        self._unknown_words: set[str] = set()
        self._wall = wall
        self._drift = math.inf
        self._resumed_at = -math.inf
        self._fresh_start = False

    # -- what sessions and tasks ask -------------------------------------------------------

    @property
    def watches(self) -> tuple[Watch, ...]:
        """What is watched now, oldest first."""
        return tuple(self._live.values())

    @property
    def running(self) -> int:
        """How many tasks are watched now."""
        return len(self._live)

    @property
    def typical(self) -> dict[str, float]:
        """Learned median duration in seconds, by endpoint and model."""
        return {str(key): seconds for key, seconds in self._pacer.typical.items()}

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
        schedule = self._pacer.model(f"{request.path} {request.model}", snapshot.estimated_time)
        watch = Watch(
            snapshot.id,
            started=started,
            deadline=self._deadline(started),
            schedule=schedule,
            request=request,
            idempotency_key=idempotency_key,
            snapshot=snapshot,
            on_end=on_end,
            looked=started,
            calls_back=request.callback_url is not None,
        )
        if watch.calls_back:
            self._calling_back += 1
            watch.sentinel = _is_sentinel(self._calling_back, len(self._live))
        schedule.started()
        if snapshot.is_terminal:
            self._end(watch)
            return watch
        self._live[watch.id] = watch
        price = self._price(watch, self._pacer.shared.price(len(self._live)))
        self._queue(watch, started + schedule.next_age(0.0, price))
        self._start()
        return watch

    def attach(self, task_id: str) -> Watch:
        """Watch a task by its id, looking at once; two callers share one watch."""
        watch = self._live.get(task_id)
        if watch is None:
            now = self._clock.now()
            schedule = self._pacer.model(_ATTACHED)
            watch = Watch(
                task_id, started=now, deadline=self._deadline(now), schedule=schedule, looked=now
            )
            schedule.started()
            self._live[task_id] = watch
            self._queue(watch, now)
            self._start()
        return watch

    def find(self, task_id: str) -> Watch | None:
        """The live watch of a task, if it is watched."""
        return self._live.get(task_id)

    def nudge(self, task_id: str) -> bool:
        """Look at a task now, or its shortest interval after its last look.

        Nudges of a task that come before that look are one, and a task whose reads fail
        keeps to the pace of their retries. False if it is not watched.
        """
        watch = self._live.get(task_id)
        if watch is None:
            return False
        watch.nudged = True
        if watch.due == _READING:
            watch.called = True
        elif watch.trouble is None:
            self._hurry(watch, watch.looked + self._policy.min_interval if watch.looks else 0.0)
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
        """Read *watch* now and return once an answer to this read is in."""
        if watch.ended:
            return
        watch.lookers = watch.lookers or []
        self._hurry(watch, 0.0)
        await _wait_in(watch.lookers)

    async def stop(self, reason: Callable[[str], EvolinkError]) -> tuple[str, ...]:
        """End every watch with ``reason(task_id)``; returns the ids that were running."""
        pending = [task for task in (self._loop, *self._readings) if task is not None]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        self._alarm.stop()
        running = tuple(self._live)
        for watch in self.watches:
            self._end(watch, reason(watch.id))
        return running

    # -- due times -------------------------------------------------------------------------

    def _deadline(self, started: float) -> float:
        patience = self._policy.deadline
        return math.inf if patience is None else started + patience

    def _price(self, watch: Watch, price: float) -> float:
        """What a look at *watch* may cost: little where a callback will tell its end."""
        if not watch.calls_back:
            return price
        if watch.sentinel:
            return self._policy.price
        trust = self._pacer.callbacks
        # While callbacks come, the seats of a read that looks for a lost one are of no use
        # to each other, so that there is nothing to share its price with.
        shared = min(1.0, trust.missed / _ONE_MISSED)
        return trust.price(shared * price + (1 - shared) * self._policy.price)

    def _queue(self, watch: Watch, due: float) -> None:
        """Look at *watch* at *due*; once more shortly before the deadline, never after it."""
        if due >= watch.deadline:
            last = watch.deadline - self._policy.min_interval
            due = last if last > max(watch.looked, self._clock.now()) else watch.deadline
        watch.due = due
        heap = self._single if watch.alone else self._shared
        heapq.heappush(heap, (due, next(self._order), watch))
        if due < self._alarm.at:
            self._wake.set()

    def _hurry(self, watch: Watch, due: float) -> None:
        """Look at *watch* at *due* at the latest, but after the read that is in the air."""
        if watch.due == _READING:
            watch.again = True
        elif (due := max(due, self._clock.now())) < watch.due:
            self._queue(watch, due)
            if len(self._shared) + len(self._single) > 2 * len(self._live) + 64:
                self._compact()

    def _compact(self) -> None:
        """Drop the entries of ended and moved watches, which would keep them in memory."""
        self._shared = [entry for entry in self._shared if entry[0] == entry[2].due]
        self._single = [entry for entry in self._single if entry[0] == entry[2].due]
        heapq.heapify(self._shared)
        heapq.heapify(self._single)

    # -- the loop --------------------------------------------------------------------------

    def _start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._run())
            self._loop.add_done_callback(self._loop_ended)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = self._clock.now()
            self._notice_resume(now)
            at = self._next_event()
            if at > now:
                self._alarm.set(at)
                await self._wake.wait()
                continue
            self._give_up_late(now)
            if self._may_read(now) and (batch := self._take(now)):
                task = asyncio.get_running_loop().create_task(self._read(batch))
                self._readings[task] = batch, min(watch.deadline for watch in batch)
                task.add_done_callback(self._reading_ended)

    def _next_event(self) -> float:
        """When the loop has something to do, infinity if only others can say."""
        at = min((deadline for _, deadline in self._readings.values()), default=math.inf)
        due = min(_first(self._shared), _first(self._single))
        if len(self._readings) < self._max_reads:
            return min(at, max(due, self._ready_at()))
        return at

    def _may_read(self, now: float) -> bool:
        return len(self._readings) < self._max_reads and self._ready_at() <= now

    def _give_up_late(self, now: float) -> None:
        """End what is past its deadline, in the air or due."""
        for task, (batch, deadline) in self._readings.items():
            if deadline > now:
                continue
            for watch in batch:
                if watch.deadline <= now and not watch.ended:
                    self._give_up(watch)
            waiting = (watch.deadline for watch in batch if not watch.ended)
            self._readings[task] = batch, min(waiting, default=math.inf)
        for heap in (self._shared, self._single):
            while _first(heap) <= now and heap[0][2].deadline <= now:
                self._give_up(heapq.heappop(heap)[2])

    def _take(self, now: float) -> list[Watch]:
        """The tasks due earliest, due or not: as many as one reading can ask for."""
        limit = self._reader.read_limit
        single = _first(self._single)
        if single <= now and single <= _first(self._shared):
            batch = [heapq.heappop(self._single)[2]]
        elif _first(self._shared) <= now:
            batch = self._take_shared(now, limit)
        else:
            return []
        for watch in batch:
            watch.due = _READING
        return batch

    def _take_shared(self, now: float, limit: int) -> list[Watch]:
        heap = self._shared
        batch: list[Watch] = []
        while len(batch) < limit and heap:
            if batch and heap[0][0] > now and (batch[0].nudged or batch[0].sentinel):
                break  # the others wait for callbacks of their own
            due, _, watch = heapq.heappop(heap)
            if due == watch.due:
                batch.append(watch)
        shared = self._pacer.shared
        shared.limit = limit
        if not (batch[0].nudged or batch[0].sentinel):
            shared.saw_read(now, [(watch.looked, watch.due) for watch in batch])
        return batch

    async def _read(self, batch: list[Watch]) -> None:
        reading = await self._reader.fetch(tuple([watch.id for watch in batch]))
        if self._fresh_start and any(
            isinstance(answer, APIConnectionError) for answer in reading.answers.values()
        ):
            # The first read after the machine slept went out on a dead connection.
            self._fresh_start = False
            for watch in batch:
                self._look_again(watch)
            return
        self._fresh_start = False
        price = self._pacer.shared.price(len(self._live))
        for watch in batch:
            if not watch.ended:
                self._apply(watch, reading, price)

    def _look_again(self, watch: Watch) -> None:
        if not watch.ended:
            self._queue(watch, self._clock.now())

    def _apply(self, watch: Watch, reading: _Reading, price: float) -> None:
        answer = reading.answers.get(watch.id)
        if isinstance(answer, TaskSnapshot):
            self._store(watch, answer, reading, price)
        elif answer is not None:
            self._failed(watch, answer, reading)
        else:  # a batch answer left it out, which proves nothing
            watch.alone = self._reader.read_limit > 1
            self._look_again(watch)
            return
        if watch.again and not watch.ended:
            watch.again = False
            self._look_again(watch)
        elif watch.lookers is not None:
            _wake_all(watch.lookers)
            watch.lookers = None

    def _store(self, watch: Watch, snapshot: TaskSnapshot, reading: _Reading, price: float) -> None:
        before, watch.snapshot = watch.snapshot, snapshot
        watch.trouble = None
        # What was seen of tasks of unknown age, or across a suspension, teaches nothing.
        instructive = watch.request is not None and watch.looked >= self._resumed_at
        started = watch.started
        if snapshot.status in TERMINAL:
            if instructive:
                watch.schedule.saw_end(
                    watch.looked - started, reading.received_at - started, snapshot.duration
                )
            self._end(watch)
            return
        age = reading.sent_at - started
        if instructive:
            watch.schedule.saw_running(watch.looked - started, age)
        watch.looked = reading.sent_at
        watch.looks += 1
        watch.nudged, watch.called = watch.called, False
        price = self._price(watch, price)
        due = started + watch.schedule.next_age(age, price, watch.looks)
        if watch.nudged:
            due = min(due, watch.looked + self._policy.min_interval)
        due = max(reading.received_at, due)
        self._queue(watch, due)
        if snapshot.status not in RUNNING:
            self._log_unknown(snapshot.status)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "task %s is %s at %s %%, next look in %.2f s",
                watch.id,
                printable(snapshot.status, 60),
                snapshot.progress,
                due - reading.received_at,
            )
        if watch.listeners is not None and (
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

    def _notice_resume(self, now: float) -> None:
        """Notice that the machine was suspended: the time of day ran ahead of the clock."""
        if self._wall is None:
            return
        drift = self._wall() - now
        if drift > self._drift + _SUSPENDED:
            logger.warning("the machine was suspended for about %.0f s", drift - self._drift)
            self._resumed_at = now
            self._fresh_start = True
            self._reader.renew()
        self._drift = drift

    # -- failed reads ----------------------------------------------------------------------

    def _failed(self, watch: Watch, error: EvolinkError, reading: _Reading) -> None:
        """A failed read is no information; only a repeated, final refusal ends the watch."""
        now = self._clock.now()
        trouble = watch.trouble = watch.trouble or Trouble(error)
        trouble.failures += 1
        if reading.single and _strike(watch, trouble, error, now):
            self._end(watch, error)
            return
        trouble.error = error
        wait = max(self._reader.wait_after(trouble.failures, error), self._policy.min_interval)
        logger.debug("reading task %s failed, again in %.2f s: %s", watch.id, wait, error)
        self._queue(watch, now + wait)

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
        watch.ended, watch.reason, watch.due = True, reason, _ENDED
        watch.schedule.left()
        if self._live.get(watch.id) is watch:
            del self._live[watch.id]
        if reason is None:
            self._count_callback(watch)
            logger.debug("task %s ended", watch.id)
        for futures in (watch.waiters, watch.listeners, watch.lookers):
            _wake_all(futures)
        watch.waiters = watch.listeners = watch.lookers = None
        if watch.on_end is not None:
            watch.on_end()
            watch.on_end = None

    def _count_callback(self, watch: Watch) -> None:
        """Learn whether the ends of tasks are told by callbacks or found by looking."""
        if watch.nudged:
            self._pacer.callbacks.saw_callback()
        elif watch.calls_back:
            before = self._pacer.callbacks.missed
            self._pacer.callbacks.saw_missed()
            if self._pacer.callbacks.missed > 2 * before:
                self._price_anew()

    def _price_anew(self) -> None:
        """Callbacks seem to have stopped: do not wait for those that are expected."""
        now = self._clock.now()
        if now < self._priced_anew + self._policy.max_interval / 4:  # it takes a while
            return
        self._priced_anew = now
        price = self._pacer.shared.price(len(self._live))
        for watch in self.watches:
            if watch.calls_back and watch.trouble is None and watch.due != _READING:
                age = watch.schedule.next_age(
                    watch.looked - watch.started, self._price(watch, price), watch.looks
                )
                self._hurry(watch, watch.started + age)

    def _reading_ended(self, task: asyncio.Task[None]) -> None:
        del self._readings[task]
        self._wake.set()
        if not task.cancelled() and (crash := task.exception()) is not None:
            self._crash(crash)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        self._loop = None
        if not task.cancelled() and (crash := task.exception()) is not None:
            self._crash(crash)

    def _crash(self, crash: BaseException) -> None:
        """An unexpected error reaches every waiter: it must not die silently."""
        logger.error("the watcher failed", exc_info=crash)
        for watch in self.watches:
            reason = EvolinkError(
                f"watching task {watch.id} stopped by an internal error ({crash!r}); "
                f"the task goes on: session.task({watch.id!r}) picks it up again"
            )
            reason.__cause__ = crash
            self._end(watch, reason)


class Alarm:
    """Calls back at a time that may be moved; one at a time.

    Attributes:
        at: When it is set for, infinity if it is not.
    """

    def __init__(
        self, clock: Clock, ring: Callable[[], None], crash: Callable[[BaseException], None]
    ) -> None:
        """An alarm that is not set; *crash* hears of a clock that fails."""
        self._clock = clock
        self._ring = ring
        self._crash = crash
        self._sleeper: asyncio.Task[None] | asyncio.TimerHandle | None = None
        self.at = math.inf

    def set(self, at: float) -> None:
        """Ring at *at*, or earlier where it was set to: who rings too early is set again."""
        if self._sleeper is not None and self.at <= at:
            return
        self.stop()
        self.at = at
        if at == math.inf:
            return
        loop = asyncio.get_running_loop()
        if isinstance(self._clock, LoopClock):  # the same, cheaper
            self._sleeper = loop.call_later(at - self._clock.now(), self._rung)
        else:
            self._sleeper = loop.create_task(self._sleep(at))
            self._sleeper.add_done_callback(self._woke)

    def stop(self) -> None:
        """Do not ring."""
        if self._sleeper is not None:
            self._sleeper.cancel()
        self._sleeper = None
        self.at = math.inf

    async def _sleep(self, at: float) -> None:
        await self._clock.sleep_until(at)

    def _woke(self, sleeper: asyncio.Task[None]) -> None:
        if sleeper.cancelled() or sleeper is not self._sleeper:
            return
        if (crash := sleeper.exception()) is not None:
            self._crash(crash)
        self._rung()

    def _rung(self) -> None:
        self._sleeper = None
        self.at = math.inf
        self._ring()


def _first(heap: list[_Entry]) -> float:
    """When the first entry that still counts is due; entries before it are dropped."""
    while heap and heap[0][0] != heap[0][2].due:
        heapq.heappop(heap)
    return heap[0][0] if heap else math.inf


def _is_sentinel(number: int, running: int) -> bool:
    """Whether task *number* with a callback is a sentinel: every 128th, and some before.

    Those before only in a crowd, which would wait for callbacks that nobody has seen yet:
    who generates one by one learns from the first that is missed.
    """
    early = number < _SENTINELS and number.bit_count() == 1 and running >= number // 2 > 0
    return early or number % _SENTINELS == 0


def _strike(watch: Watch, trouble: Trouble, error: EvolinkError, now: float) -> bool:
    """Note a final refusal of a single read; True if it was the last that was needed."""
    if not isinstance(error, APIStatusError) or not error.from_api or rule_of(error)[0]:
        return False
    missing = isinstance(error, NotFoundError)
    if missing and watch.request is not None and now - watch.started < _REPLICA_LAG:
        return False
    if type(error) is not type(trouble.error) or trouble.strikes == 0:
        trouble.strikes, trouble.struck_at = 1, now
        return False
    if missing and now - trouble.struck_at < _STRIKE_GAP:
        return False
    trouble.strikes += 1
    few = isinstance(error, NotFoundError | AuthenticationError | PermissionDeniedError)
    return trouble.strikes >= (_STRIKES if few else _OTHER_STRIKES)


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
