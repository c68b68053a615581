"""Watches every running task of a session.

A heap of due times, one alarm for the earliest, readings filled with the tasks due first, and
the only place where the state of a task changes. It knows the network only as
``fetch(ids) -> Reading``.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Container, Mapping
from typing import Final, Protocol

from evolink_async._clock import Clock, LoopClock
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import RUNNING, TERMINAL, Page, TaskSnapshot
from evolink_async._polling.policy import PollPolicy, Schedule
from evolink_async._polling.pricing import Pacer
from evolink_async._polling.watch import READING, Cohort, DueQueue, Futures, Group, Trouble, Watch
from evolink_async._text import lines_of, printable
from evolink_async.errors import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    EvolinkError,
    NotFoundError,
    PermissionDeniedError,
    TaskTimeoutError,
)

__all__ = ["Watcher", "differs"]

logger = logging.getLogger(__name__)

_REPLICA_LAG: Final = 60.0
"""Seconds after our own submit in which a 404 may only mean that a replica is behind."""
_STRIKE_GAP: Final = 5.0
"""Seconds that must lie between two refusals for the second to count."""
_STRIKES: Final = 2
_OTHER_STRIKES: Final = 3
_MISSING: Final = 4
"""Batch answers in a row that leave a task out before a replica that lags is no excuse."""
_SPOILED: Final = (3, 6)
"""Batch reads in a row that fail with a task, while others work, before it is read singly: at
least, at most, and between them as many as chance makes less likely than `_CHANCE`."""
_CHANCE: Final = 0.005
_FAILING_RATE: Final = 0.05
"""What one batch read weighs in the running share of those that fail."""
_SUSPENDED: Final = 30.0
"""Seconds the time of day must run ahead of the clock to mean that the machine slept."""
_ATTACHED: Final = "attached"
"""The kind of tasks found by their id, of which nothing else is known."""
_SENTINELS: Final = 128
"""One in so many tasks with a callback is polled at as if it had none."""
_FIRST_SENTINELS: Final = 8
"""One in so many of the first 128 while hardly any callback has come; then one in twice as many."""
_PROVEN: Final = 32
"""Callbacks that came from which others are expected to come as well."""
_SENTINEL_SHARE: Final = 0.5
"""How useful a seat is to a sentinel in a read of all of them."""
_ONE_MISSED: Final = 0.3
"""Share of missed callbacks from which looking for them is like looking without them."""
_WIDTH: Final = 0.5
"""Shortest intervals between the submits of a cohort's first and last task."""
_MOST: Final = 50
"""Tasks that wait for their first look together."""
_ENDS_AT_ONCE: Final = 500
"""Tasks that closing ends before others may run."""
_SWEEP: Final = 0.25
"""Seconds from one going through all deadlines to the next, if that many pass."""
_KINDS: Final = 64
"""Cohorts that are open to more tasks."""
_AT_ONCE: Final = -math.inf
"""In place of a due time: before all that has been due for a while."""


class _Reading(Protocol):
    @property
    def sent_at(self) -> float: ...
    @property
    def received_at(self) -> float: ...
    @property
    def answers(self) -> Mapping[str, TaskSnapshot | EvolinkError | None]: ...
    @property
    def single(self) -> bool: ...
    @property
    def page(self) -> Page | None: ...
    @property
    def paid(self) -> bool: ...


class _Reader(Protocol):
    """What the watcher needs of a transport."""

    @property
    def read_limit(self) -> int: ...
    @property
    def on_trial(self) -> bool: ...
    async def fetch(self, ids: tuple[str, ...]) -> _Reading: ...
    def wait_after(self, failures: int, *, paid: bool) -> float: ...
    def renew(self) -> None: ...


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
        contended: Callable[[], bool] | None = None,
        wall: Callable[[], float] | None = None,
    ) -> None:
        """A watcher on the running loop.

        Args:
            reader: Where tasks are read.
            clock: The session's clock.
            policy: When to look.
            ready_at: When cool-down and rate allow the next request.
            max_reads: Readings in the air at once.
            contended: Where there is a request rate, whether a read must wait for its turn
                among submits; None where there is no rate.
            wall: The time of day in seconds, to notice that the machine was suspended;
                None not to.
        """
        self._reader = reader
        self._clock = clock
        self._policy = policy
        self._pacer = Pacer(policy)
        self._ready_at = ready_at
        self._max_reads = max_reads
        self._contended = contended
        self._stopping = False
        self._live: dict[str, Watch] = {}
        # Of tasks that share readings, and of those that must be read singly.
        self._shared, self._single = DueQueue(), DueQueue()
        # Cohorts that further tasks may join.
        self._open: dict[Schedule, Cohort] = {}
        self._alarm = Alarm(clock, self._go_on, self._crash)
        self._readings: set[asyncio.Task[None]] = set()
        # When the last batch read was sent that was answered; how many of late are not.
        self._batch_worked_at = -math.inf
        self._batch_failing = 0.0
        # No deadline is before this; when deadlines were last gone through.
        self._first_deadline = math.inf
        self._swept_at = -math.inf
        self._calling_back = 0
        self._sentinels = 0
        self._priced_anew = -math.inf
        self._unknown_words: set[str] = set()
        self._wall = wall
        self._drift = math.inf if wall is None else wall() - clock.now()
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
        replayed: bool = False,
    ) -> Watch:
        """Watch a task this session has just submitted.

        *on_end* is called once it has ended. A *replayed* answer may be of long ago: such a
        task is polled at like one found by its id.
        """
        watch = self._live.get(snapshot.id)
        if watch is not None:  # an idempotent repeat of a submit whose task is watched already
            if watch.request is None:
                watch.request, watch.idempotency_key = request, idempotency_key
            on_end()
            return watch
        if replayed:
            group = self._unknown_age(started)
        else:
            kind = f"{request.path} {request.model}"
            schedule = self._pacer.known(kind) or self._pacer.model(kind, snapshot.estimated_time)
            group = self._group(schedule, started, calls_back=request.callback_url is not None)
        watch = Watch(
            snapshot.id,
            started=started,
            deadline=self._deadline(started),
            group=group,
            request=request,
            idempotency_key=idempotency_key,
            seen=snapshot,
            on_end=on_end,
        )
        group.watches.append(watch)
        group.cohort.schedule.started()
        if snapshot.is_terminal:
            self._end(watch)
            return watch
        self._live[watch.id] = watch
        if replayed:
            self._queue(watch, self._clock.now())
        elif len(group.watches) == 1:
            self._queue_first(watch)
        self._start(watch)
        if logger.isEnabledFor(logging.DEBUG):
            wait = group.due - self._clock.now()
            logger.debug("task %s: first look in %.2f s", watch.id, wait)
        return watch

    def _unknown_age(self, now: float) -> Group:
        """A group for one task of which nobody knows how old it is: it teaches nothing."""
        schedule = self._pacer.model(_ATTACHED)
        return Group(Cohort(schedule, now, self._deadline(now), teaches=False), now)

    def _group(self, schedule: Schedule, started: float, *, calls_back: bool) -> Group:
        """Those a task submitted at *started* is polled at first with."""
        cohort = self._cohort(schedule, started, calls_back=calls_back)
        if (group := cohort.unread) is not None and len(group.watches) < _MOST:
            return group
        return Group(cohort, cohort.started)

    def _cohort(self, schedule: Schedule, started: float, *, calls_back: bool) -> Cohort:
        """The cohort of a task submitted at *started*."""
        self._calling_back += calls_back
        sentinel = calls_back and self._is_sentinel()
        self._sentinels += sentinel
        width = 0.0 if sentinel or self._policy.wait else _WIDTH * self._policy.min_interval
        newest = self._open.get(schedule)
        if (
            newest is not None
            and newest.calls_back == calls_back
            and not newest.sentinel
            and abs(started - newest.started) < width
        ):
            return newest
        cohort = Cohort(
            schedule,
            started,
            self._deadline(started),
            calls_back=calls_back,
            sentinel=sentinel,
        )
        if len(self._open) >= _KINDS:
            self._open.clear()
        self._open[schedule] = cohort
        return cohort

    def _is_sentinel(self) -> bool:
        """Whether the task submitted now is one: every so many, and some of the first.

        Those only in a crowd, which would wait for callbacks that nobody has seen yet: who
        generates one by one learns from the first that is missed.
        """
        number = self._calling_back
        if self._pacer.callbacks.heard >= _PROVEN:
            return number % _SENTINELS == 0
        every = _FIRST_SENTINELS if number <= _SENTINELS else 2 * _FIRST_SENTINELS
        due = number % every == 0 or (number < every and number.bit_count() == 1 < number)
        return due and len(self._live) >= min(number, every) // 2

    def attach(self, task_id: str) -> Watch:
        """Watch a task by its id, looking at once; two callers share one watch."""
        watch = self._live.get(task_id)
        if watch is None:
            now = self._clock.now()
            group = self._unknown_age(now)
            watch = Watch(task_id, started=now, deadline=self._deadline(now), group=group)
            group.watches.append(watch)
            group.cohort.schedule.started()
            self._live[task_id] = watch
            self._queue(watch, now)
            self._start(watch)
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
        logger.debug("task %s: something told that it has ended", watch.id)
        watch.nudged, group = True, watch.group
        group.plain = False
        if group.due == READING:
            watch.called = True
        elif watch.trouble is None:
            self._hurry(
                watch, group.polled + self._policy.min_interval if group.polls else _AT_ONCE
            )
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
            watch.group.plain = False
            await _wait_in(watch.listeners)

    async def look(self, watch: Watch) -> None:
        """Read *watch* now and return once an answer to this read is in."""
        if watch.ended:
            return
        logger.debug("task %s: a look was asked for", watch.id)
        watch.lookers = watch.lookers or []
        watch.group.plain = False
        self._hurry(watch, _AT_ONCE)
        await _wait_in(watch.lookers)

    async def stop(self, reason: Callable[[str], EvolinkError]) -> list[str]:
        """End every watch with ``reason(task_id)``.

        Returns the ids of running tasks that were submitted here: who attached to others
        has theirs.
        """
        self._stopping = True
        pending = tuple(self._readings)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        self._alarm.stop()
        running: list[str] = []
        # By their ids: who held all the watches would free them all in one go.
        for number, task_id in enumerate(tuple(self._live)):
            if (watch := self._live.get(task_id)) is not None:
                if watch.request is not None:
                    running.append(task_id)
                self._end(watch, reason(task_id))
            if number % _ENDS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return running

    # -- due times -------------------------------------------------------------------------

    def _deadline(self, started: float) -> float:
        patience = self._policy.deadline
        return math.inf if patience is None else started + patience

    def _price(self, cohort: Cohort, price: float) -> float:
        """What a look at a task may cost: little where a callback will tell its end."""
        if not cohort.calls_back:
            return price
        if cohort.sentinel:
            return self._policy.price / max(1.0, _SENTINEL_SHARE * self._sentinels)
        trust = self._pacer.callbacks
        # While callbacks come, the seats of a read that polls for a lost one are of no use
        # to each other, so that there is nothing to share its price with.
        shared = min(1.0, trust.missed / _ONE_MISSED)
        return trust.price(shared * price + (1 - shared) * self._policy.price)

    def _queue(self, watch: Watch, due: float) -> None:
        """Look at *watch* at *due*; once more shortly before the deadline, never after it."""
        group = watch.leave()
        if due >= group.cohort.deadline:
            due = group.cohort.deadline - self._policy.min_interval
            read_before = self._policy.min_interval if group.polls or watch.trouble else 0.0
            if due <= self._clock.now() + read_before:
                group.due = watch.deadline  # that look has been
                return
        self._push(self._single if watch.alone else self._shared, group, due)

    def _queue_first(self, watch: Watch) -> None:
        """Queue a task just submitted; the next of its cohort may wait with it."""
        cohort, group = watch.cohort, watch.group
        price = self._price(cohort, self._pacer.shared.price(len(self._live)))
        due = cohort.started + cohort.schedule.next_age(0.0, price)
        due = self._pacer.shared.on_beat(due, cohort.started, len(self._live))
        if due < cohort.deadline:
            cohort.unread = group
            self._push(self._shared, group, due)
        else:  # a look half-way to so near a deadline is better than none
            halfway = (cohort.started + cohort.deadline) / 2
            self._queue(watch, max(halfway, cohort.deadline - self._policy.min_interval))

    def _push(self, queue: DueQueue, group: Group, due: float) -> None:
        queue.push(group, due)
        if due < self._alarm.at:
            self._alarm.set(due)

    def _hurry(self, watch: Watch, due: float) -> None:
        """Look at *watch* at *due* at the latest, but after the read that is in the air."""
        if watch.group.due == READING:
            watch.again, watch.group.plain = True, False
        elif due < watch.group.due:
            self._queue(watch, due if due > self._clock.now() else _AT_ONCE)
            if len(self._shared) + len(self._single) > 2 * len(self._live) + 64:
                self._shared.compact()
                self._single.compact()

    # -- reads -----------------------------------------------------------------------------

    def _start(self, watch: Watch) -> None:
        if watch.deadline < self._first_deadline:
            self._first_deadline = watch.deadline
            self._alarm.set(watch.deadline)

    def _go_on(self) -> None:
        """Do what there is to do now, and set the alarm for what comes next."""
        if self._stopping:
            return
        try:
            self._alarm.set(self._do_what_is_due())
        except Exception as exc:  # noqa: BLE001 - it must not die silently
            self._crash(exc)

    def _do_what_is_due(self) -> float:
        """Send the reads that are due; returns when there is more to do."""
        self.notice_resume()
        now = self._clock.now()
        if self._next_deadline() <= now:
            self._give_up_late(now)
        while self._may_read(now) and (groups := self._take(now)):
            task = asyncio.get_running_loop().create_task(self._read(groups))
            self._readings.add(task)
            task.add_done_callback(self._reading_ended)
            if self._contended is not None or self._reader.on_trial:
                return _AT_ONCE  # let it begin, which takes a token or changes the limit
        if logger.isEnabledFor(logging.DEBUG):
            self._log_wait(now)
        return self._next_event()

    def _next_event(self) -> float:
        """When there is something to do, infinity if only others can say."""
        if len(self._readings) >= self._max_reads:
            return self._next_deadline()
        due = min(_due(self._shared), _due(self._single))
        return min(self._next_deadline(), max(due, self._ready_at()))

    def _log_wait(self, now: float) -> None:
        """Say why nothing is read although something is due."""
        due = min(_due(self._shared), _due(self._single))
        if due > now:
            return
        if len(self._readings) >= self._max_reads:
            logger.debug("reads wait: %d are in the air, the most there may be", self._max_reads)
        else:
            wait = self._ready_at() - now
            logger.debug("reads wait %.2f s for the cool-down or the request rate", wait)

    def _next_deadline(self) -> float:
        """When to go through all deadlines, which takes its time where tasks are many."""
        if not self._live:
            return math.inf
        return max(self._first_deadline, self._swept_at + min(self._policy.min_interval, _SWEEP))

    def _may_read(self, now: float) -> bool:
        if len(self._readings) >= self._max_reads:
            return False
        return self._ready_at() <= now or (self._contended is not None and self._contended())

    def _give_up_late(self, now: float) -> None:
        """End what is past its deadline, be it queued, in the air or held up."""
        self._swept_at = now
        for watch in [watch for watch in self._live.values() if watch.deadline <= now]:
            self._give_up(watch)
        self._first_deadline = min((w.deadline for w in self._live.values()), default=math.inf)

    def _take(self, now: float) -> list[Group]:
        """The tasks due earliest, due or not: as many as one reading can ask for."""
        shared, single = _due(self._shared), _due(self._single)
        if single <= now and single <= shared:
            group = self._single.pop()
            group.due = READING
            return [group]
        return self._take_shared(now, self._reader.read_limit) if shared <= now else []

    def _take_shared(self, now: float, limit: int) -> list[Group]:
        queue, room = self._shared, limit
        groups: list[Group] = []
        seats: list[tuple[float, float, int]] = []
        hasty = False
        while room and (group := queue.first()) is not None:
            due = group.due
            if hasty and due > now and not (groups[0].cohort.sentinel and group.cohort.sentinel):
                break  # the others wait for callbacks of their own
            queue.pop()
            if len(group.watches) > room:
                queue.push(group.split(room), due)
            group.due = READING
            hasty = hasty or (not groups and (group.watches[0].nudged or group.cohort.sentinel))
            groups.append(group)
            seats.append((group.polled, due, len(group.watches)))
            room -= len(group.watches)
        self._pacer.shared.limit = limit
        if not hasty:
            self._pacer.shared.saw_read(now, seats)
        return groups

    async def _read(self, groups: list[Group]) -> None:
        ids = tuple([watch.id for group in groups for watch in group.watches])
        if not ids:  # they have just been given up
            return
        reading = await self._reader.fetch(ids)
        if self._fresh_start and any(
            isinstance(answer, APIConnectionError) for answer in reading.answers.values()
        ):
            # The first read after the machine slept went out on a dead connection.
            self._fresh_start = False
            for watch in _watches_of(groups):
                self._look_again(watch)
            return
        self._fresh_start = False
        failed = [a for a in reading.answers.values() if isinstance(a, EvolinkError)]
        if len(ids) > 1:
            self._note_batch(reading, failed[0] if len(failed) == len(ids) else None)
        if failed:
            logger.warning("a read failed for %d of %d tasks: %s", len(failed), len(ids), failed[0])
        price = self._pacer.shared.price(len(self._live))
        if reading.page is None or logger.isEnabledFor(logging.DEBUG):
            self._apply_each(_watches_of(groups), reading, price)
        else:
            self._apply_page(groups, reading, reading.page, price)

    def _look_again(self, watch: Watch) -> None:
        if not watch.ended:
            self._queue(watch, _AT_ONCE)

    def _apply_page(self, groups: list[Group], reading: _Reading, page: Page, price: float) -> None:
        """Note what most answers say, that the task goes on, for whole groups at once."""
        going: dict[Cohort, Group] = {}
        others = reading.answers
        for group in groups:
            if others or not group.plain:
                self._apply_each(_odd_ones(group, others), reading, price)
                if group.due != READING:  # its last was one of them
                    continue
            if not group.watches:
                continue
            cohort = group.cohort
            if cohort.teaches and group.polled >= self._resumed_at:
                started = cohort.started
                cohort.schedule.saw_running(
                    group.polled - started, reading.sent_at - started, len(group.watches)
                )
            first = going.setdefault(cohort, group)
            if first is not group:
                first.join(group)
        for cohort, group in going.items():
            group.saw(page, reading.sent_at)
            self._queue_again(group, self._next_look(cohort, reading, price, group.polls))

    def _next_look(self, cohort: Cohort, reading: _Reading, price: float, polls: int) -> float:
        age = reading.sent_at - cohort.started
        price = self._price(cohort, price)
        due = cohort.started + cohort.schedule.next_age(age, price, polls)
        due = self._pacer.shared.on_beat(due, reading.sent_at, len(self._live))
        return max(reading.received_at, due)

    def _queue_again(self, group: Group, due: float) -> None:
        """Queue tasks that were polled at together."""
        if due < group.cohort.deadline:
            self._push(self._shared, group, due)
        else:
            for watch in tuple(group.watches):
                self._queue(watch, due)

    def _apply_each(self, watches: list[Watch], reading: _Reading, price: float) -> None:
        for watch in watches:
            if not watch.ended:
                self._apply(watch, reading, price)

    def _apply(self, watch: Watch, reading: _Reading, price: float) -> None:
        answer = reading.answers.get(watch.id)
        if answer is None and reading.page is not None and watch.id not in reading.answers:
            answer = _on_page(reading.page, watch.id)
        if isinstance(answer, TaskSnapshot):
            self._store(watch, answer, reading, price)
        elif answer is not None:
            self._failed(watch, answer, reading)
        else:
            self._left_out(watch)
            return
        if watch.again and not watch.ended:
            watch.again = False
            self._look_again(watch)
        elif watch.lookers is not None:
            _wake_all(watch.lookers)
            watch.lookers = None
        watch.listeners = watch.listeners or None
        watch.group.plain = watch.plain

    def _left_out(self, watch: Watch) -> None:
        """A batch answer left it out, which proves nothing: a replica may be behind."""
        now = self._clock.now()
        if self._reader.read_limit > 1:
            watch.missing += 1
            logger.debug(
                "task %s: left out by a batch answer, %d in a row", watch.id, watch.missing
            )
            if watch.missing < _MISSING and _may_lag(watch, now):
                wait = self._reader.wait_after(watch.missing, paid=True)
                self._queue(watch, now + max(wait, self._policy.min_interval))
                return
            watch.alone = True
        self._look_again(watch)

    def _store(self, watch: Watch, snapshot: TaskSnapshot, reading: _Reading, price: float) -> None:
        news = watch.listeners is not None and differs(_last_seen(watch), snapshot)
        group = watch.leave()
        watch.seen, group.page, group.own = snapshot, None, True
        watch.trouble = None
        if reading.single:
            watch.alone = watch.spoiled > 1
        else:
            watch.missing = watch.spoiled = 0
        # What was seen of tasks of unknown age, or across a suspension, teaches nothing.
        cohort, polled = group.cohort, group.polled
        instructive = cohort.teaches and polled >= self._resumed_at
        started = cohort.started
        if snapshot.status in TERMINAL:
            if instructive:
                cohort.schedule.saw_end(
                    polled - started, reading.received_at - started, snapshot.duration
                )
            self._end(watch)
            return
        if instructive:
            cohort.schedule.saw_running(polled - started, reading.sent_at - started)
        group.polled = reading.sent_at
        group.polls += 1
        watch.nudged, watch.called = watch.called, False
        # Who may have to be read singly shares the price of a read with nobody.
        price = self._policy.price if watch.missing else price
        due = self._next_look(cohort, reading, price, group.polls)
        if watch.nudged:
            due = max(reading.received_at, min(due, group.polled + self._policy.min_interval))
        self._queue(watch, due)
        if snapshot.status not in RUNNING:
            self._log_unknown(snapshot.status)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "task %s is %s at %s %%, %s",
                watch.id,
                printable(snapshot.status, 60),
                snapshot.progress,
                _plan(watch, reading.received_at),
            )
        if news:
            _wake_all(watch.listeners)
            watch.listeners = None

    def _log_unknown(self, status: str) -> None:
        if status not in self._unknown_words and len(self._unknown_words) < 100:
            self._unknown_words.add(status)
            logger.warning("unknown task status %s: treated as running", printable(status, 60))

    def notice_resume(self) -> None:
        """Notice that the machine was suspended: the time of day ran ahead of the clock."""
        if self._wall is None:
            return
        now = self._clock.now()
        drift = self._wall() - now
        if drift > self._drift + _SUSPENDED:
            logger.warning("the machine was suspended for about %.0f s", drift - self._drift)
            self._resumed_at = now
            self._fresh_start = True
            self._reader.renew()
            self._look_at_all(now)
        self._drift = drift

    def _look_at_all(self, now: float) -> None:
        """Nobody knows how old tasks are after a suspension: look at all that wait."""
        for queue in (self._shared, self._single):
            for group in queue.clear():
                self._push(queue, group, min(now, group.due))

    # -- failed reads ----------------------------------------------------------------------

    def _failed(self, watch: Watch, error: EvolinkError, reading: _Reading) -> None:
        """A failed read is no information; only a repeated, final refusal ends the watch."""
        now = self._clock.now()
        trouble = watch.trouble = watch.trouble or Trouble(error, reading.sent_at)
        trouble.failures += 1
        throttled = error.is_throttle
        trouble.throttled += throttled
        if reading.single and _strike(watch, trouble, error, now):
            self._end(watch, error)
            return
        trouble.error = error
        if not (reading.single or throttled) and self._batch_worked_at > trouble.since:
            self._suspect(watch, trouble)
        wait = self._reader.wait_after(trouble.failures, paid=reading.paid)
        self._queue(watch, now + max(wait, self._policy.min_interval))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "reading task %s failed, %s: %s",
                watch.id,
                _plan(watch, now, self._ready_at()),
                error,
            )

    def _note_batch(self, reading: _Reading, failure: EvolinkError | None) -> None:
        """Note whether a batch read worked."""
        if failure is None:
            self._batch_worked_at = reading.sent_at
        if failure is None or not failure.is_throttle:
            self._batch_failing += _FAILING_RATE * ((failure is not None) - self._batch_failing)

    def _suspect(self, watch: Watch, trouble: Trouble) -> None:
        """Batch reads with it fail while others work: it may be what they fail of."""
        few, many = _SPOILED
        enough = math.log(_CHANCE) / math.log(min(max(self._batch_failing, 0.01), 0.99))
        failures = trouble.failures - trouble.throttled + watch.spoiled
        if failures >= min(max(few, enough), many):
            watch.spoiled += 1
            watch.alone = True
            logger.debug("task %s: read singly, batch reads with it fail", watch.id)

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
                snapshot=_last_seen(watch),
            ),
        )

    def _end(self, watch: Watch, reason: EvolinkError | None = None) -> None:
        watch.end()
        watch.reason = reason
        watch.cohort.schedule.left()
        self._sentinels -= watch.cohort.sentinel
        if self._live.get(watch.id) is watch:
            del self._live[watch.id]
            if not self._live:
                self._first_deadline = math.inf
        if reason is None:
            self._count_callback(watch)
            logger.debug("task %s ended", watch.id)
        if watch.waiters or watch.listeners or watch.lookers:
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
        elif watch.cohort.calls_back:
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
        for group in self._shared:
            cohort = group.cohort
            if cohort.calls_back and group.watches[0].trouble is None:
                age = cohort.schedule.next_age(
                    group.polled - cohort.started, self._price(cohort, price), group.polls
                )
                if (sooner := max(now, cohort.started + age)) < group.due:
                    self._push(self._shared, group, sooner)

    def _reading_ended(self, task: asyncio.Task[None]) -> None:
        if len(self._readings) >= self._max_reads or not self._live:
            self._alarm.set(_AT_ONCE)  # the others waited for this one, or there are none
        self._readings.discard(task)
        crash = self._crash_of(task)
        if crash is None:
            try:
                self.notice_resume()
            except Exception as exc:  # noqa: BLE001 - a clock of the caller's
                crash = exc
        if crash is not None:
            self._crash(crash)

    def _crash_of(self, task: asyncio.Task[None]) -> BaseException | None:
        """Why *task* ended that should not have; cancelled by anybody else is a reason, too."""
        if task.cancelled():
            return None if self._stopping else asyncio.CancelledError("cancelled by others")
        return task.exception()

    def _crash(self, crash: BaseException) -> None:
        """An unexpected error reaches every waiter: it must not die silently."""
        if isinstance(crash, asyncio.CancelledError):
            logger.warning("the watcher was cancelled by others; nothing is watched any more")
        else:
            logger.error("the watcher failed", exc_info=crash)
        ours = [watch.id for watch in self.watches if watch.request is not None]
        for line in lines_of(ours):
            logger.warning("tasks still running: %s", line)
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
        self._sleeper: asyncio.Task[None] | asyncio.Handle | None = None
        self.at = math.inf

    def set(self, at: float) -> None:
        """Ring at *at*, or earlier where it was set to: who rings too early is set again."""
        if at == math.inf:
            self.stop()
            return
        if self._sleeper is not None and self.at <= at:
            return
        self.stop()
        self.at = at
        loop = asyncio.get_running_loop()
        if at == _AT_ONCE:
            self._sleeper = loop.call_soon(self._rung)
        elif isinstance(self._clock, LoopClock):  # the same as to sleep, cheaper
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
        if sleeper is not self._sleeper:
            return
        if sleeper.cancelled():
            self._crash(asyncio.CancelledError("cancelled by others"))
        elif (crash := sleeper.exception()) is not None:
            self._crash(crash)
        self._rung()

    def _rung(self) -> None:
        self._sleeper = None
        self.at = math.inf
        self._ring()


def differs(seen: TaskSnapshot | None, new: TaskSnapshot) -> bool:
    """True if *new* is news to who has *seen* the other: its status or progress."""
    return seen is None or (seen.status, seen.progress) != (new.status, new.progress)


def _last_seen(watch: Watch) -> TaskSnapshot | None:
    """What was last read of a task, None also if it cannot be read any more."""
    try:
        return watch.snapshot
    except EvolinkError:
        return None


def _on_page(page: Page, task_id: str) -> TaskSnapshot | EvolinkError:
    """What *page* says of a task that goes on, or why it cannot be read."""
    try:
        return page.snapshot(task_id)
    except EvolinkError as exc:
        return exc


def _plan(watch: Watch, now: float, ready_at: float = -math.inf) -> str:
    """What comes next for a task that was just polled at, in words."""
    if watch.group.due < watch.deadline:
        return f"next look in {max(watch.group.due, ready_at) - now:.2f} s"
    return f"no look before its deadline in {watch.deadline - now:.2f} s"


def _odd_ones(group: Group, others: Container[str]) -> list[Watch]:
    """Those of whom more is to be noted than that they go on; *others* are those who do not."""
    plain = group.plain
    return [w for w in group.watches if w.id in others or not (plain or w.plain)]


def _watches_of(groups: list[Group]) -> list[Watch]:
    return [watch for group in groups for watch in group.watches]


def _due(queue: DueQueue) -> float:
    """When the first of *queue* is due."""
    group = queue.first()
    return math.inf if group is None else group.due


def _may_lag(watch: Watch, now: float) -> bool:
    """True if a task of ours that is said not to exist may only be too new."""
    return watch.request is not None and now - watch.started < _REPLICA_LAG


def _strike(watch: Watch, trouble: Trouble, error: EvolinkError, now: float) -> bool:
    """Note a final refusal of a single read; True if it was the last that was needed."""
    if not isinstance(error, APIStatusError) or not error.from_api or error.retryable:
        return False
    missing = isinstance(error, NotFoundError)
    if missing and _may_lag(watch, now):
        return False
    if type(error) is not type(trouble.error) or trouble.strikes == 0:
        trouble.strikes, trouble.struck_at = 1, now
        return False
    if missing and now - trouble.struck_at < _STRIKE_GAP:
        return False
    trouble.strikes += 1
    few = isinstance(error, NotFoundError | AuthenticationError | PermissionDeniedError)
    return trouble.strikes >= (_STRIKES if few else _OTHER_STRIKES)


async def _wait_in(futures: Futures) -> None:
    """Wait among *futures*; a cancelled waiter leaves no trace."""
    future = asyncio.get_running_loop().create_future()
    futures.append(future)
    try:
        await future
    finally:
        if future in futures:
            futures.remove(future)


def _wake_all(futures: Futures | None) -> None:
    for future in futures or ():
        if not future.done():
            future.set_result(None)
