"""The watcher: polls every running task of a session until it has ended.

One queue of due times, one timer for the earliest, polls filled with the tasks due first,
and the only place where the state of a task changes. What failed polls mean for a task is
decided in `failures`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Final

from evolink_async._clock import AT_ONCE, NEVER, Clock, SuspendWatch, Timer
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import RUNNING, TERMINAL, TaskSnapshot
from evolink_async._polling.failures import BatchPolls, Failures
from evolink_async._polling.policy import PollPolicy
from evolink_async._polling.pricing import Pacer
from evolink_async._polling.watch import (
    IN_FLIGHT,
    DueQueue,
    Kind,
    Network,
    PollResult,
    Watch,
    differs,
    wait_in,
    wake_all,
)
from evolink_async._text import lines_of, printable
from evolink_async.errors import APIConnectionError, EvolinkError

__all__ = ["Watcher"]

logger = logging.getLogger(__name__)

_REPLICA_LAG: Final = 60.0
"""Seconds after our own submit in which a 404 may only mean that a replica is behind."""
_ATTACHED: Final = "attached"
"""The schedule of tasks picked up by their id."""
_ENDS_AT_ONCE: Final = 500
"""Tasks that closing ends before others may run."""
_SWEEP: Final = 0.25
"""Least seconds from one pass through all deadlines to the next."""
_STATUSES_LOGGED: Final = 100
"""Unknown statuses that are logged, each once."""


class Watcher:
    """Watches tasks until each has ended."""

    def __init__(
        self,
        network: Network,
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
            network: Where tasks are polled.
            clock: The session's clock.
            policy: When to poll.
            ready_at: When cool-down and rate allow the next request.
            max_reads: Polls in flight at once.
            contended: Where there is a request rate, whether a poll must wait for its turn
                among submits; None where there is no rate.
            wall: The time of day in seconds, to notice that the machine was suspended;
                None not to.
        """
        self._network = network
        self._clock = clock
        self._policy = policy
        self._pacer = Pacer(policy)
        self._ready_at = ready_at
        self._max_reads = max_reads
        self._contended = contended
        self._suspended = SuspendWatch(clock, wall)
        self._live: dict[str, Watch] = {}
        self._queue = DueQueue()
        self._timer = Timer(clock, self._go_on, self._crash)
        self._in_flight: set[asyncio.Future[PollResult]] = set()
        self._batch_polls = BatchPolls()
        # No deadline passes before this.
        self._sweep_at = NEVER
        self._unknown_statuses: set[str] = set()

    # -- what sessions and tasks call ------------------------------------------------------

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
        return self._pacer.typical

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

        *on_end* is called once it has ended. A *replayed* answer may be old: such a task is
        polled like one found by its id.
        """
        watch = self._live.get(snapshot.id)
        if watch is not None:  # a repeated submit, answered with a task that is watched already
            if watch.request is None:
                watch.request, watch.idempotency_key = request, idempotency_key
            on_end()
            return watch
        kind, key = Kind.POLLED, f"{request.path} {request.model}"
        if replayed:
            kind, key = Kind.ATTACHED, _ATTACHED
        elif request.callback_url is not None:
            canary = self._pacer.callbacks.choose_canary(len(self._live))
            kind = Kind.CANARY if canary else Kind.CALLBACK
        schedule = self._pacer.model(key, None if replayed else snapshot.estimated_time)
        watch = Watch(
            snapshot.id,
            started=started,
            kind=kind,
            schedule=schedule,
            request=request,
            idempotency_key=idempotency_key,
            on_end=on_end,
            snapshot=snapshot,
        )
        self._start(watch)
        if snapshot.is_terminal:
            self._end(watch)
            return watch
        self._push(watch, self._clock.now() if replayed else self._first_due(watch))
        if logger.isEnabledFor(logging.DEBUG):
            wait = watch.due - self._clock.now()
            logger.debug("task %s: first poll in %.2f s", watch.id, wait)
        return watch

    def attach(self, task_id: str) -> Watch:
        """Watch a task by its id, polling it at once; two callers share one watch."""
        watch = self._live.get(task_id)
        if watch is None:
            schedule = self._pacer.model(_ATTACHED)
            now = self._clock.now()
            watch = Watch(task_id, started=now, kind=Kind.ATTACHED, schedule=schedule)
            self._start(watch)
            self._push(watch, now)
        return watch

    def find(self, task_id: str) -> Watch | None:
        """The live watch of a task, if it is watched."""
        return self._live.get(task_id)

    def nudge(self, task_id: str) -> bool:
        """Poll a task now, or ``min_interval`` after its last poll; False if it is not watched.

        Further nudges before that poll change nothing. A task whose polls fail keeps to the
        pace of the retries.
        """
        watch = self._live.get(task_id)
        if watch is None:
            return False
        logger.debug("task %s: nudged, it is said to have ended", watch.id)
        watch.nudged = True
        if watch.due == IN_FLIGHT:
            watch.make_callers().nudged = True
        elif watch.last_error is None:
            soonest = watch.polled + self._policy.min_interval if watch.polls else AT_ONCE
            self._hurry(watch, soonest)
        return True

    async def until_ended(self, watch: Watch) -> None:
        """Return once *watch* has ended."""
        if not watch.ended:
            await wait_in(watch.make_callers().end)

    async def until_changed(self, watch: Watch) -> None:
        """Return at the next change of status or progress, or the end."""
        if not watch.ended:
            await wait_in(watch.make_callers().change)

    async def poll(self, watch: Watch) -> None:
        """Poll *watch* now and return once an answer to this poll is in."""
        if watch.ended:
            return
        logger.debug("task %s: a poll was asked for", watch.id)
        callers = watch.make_callers()
        if watch.due == IN_FLIGHT:
            callers.again = True
        else:
            self._hurry(watch, AT_ONCE)
        await wait_in(callers.poll)

    async def stop(self, reason: Callable[[str], EvolinkError]) -> list[str]:
        """End every watch with ``reason(task_id)``; returns the ids of those submitted here."""
        self._timer.close()
        polls = tuple(self._in_flight)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        running: list[str] = []
        # So that each watch is freed as it ends, not all of them at once.
        self._queue = DueQueue()
        for number, task_id in enumerate(tuple(self._live)):
            if (watch := self._live.get(task_id)) is not None:
                if watch.request is not None:
                    running.append(task_id)
                self._end(watch, reason(task_id))
            if number % _ENDS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return running

    # -- due times -------------------------------------------------------------------------

    def _start(self, watch: Watch) -> None:
        watch.schedule.started()
        self._live[watch.id] = watch
        self._pacer.callbacks.canaries += watch.kind is Kind.CANARY
        deadline = self._deadline(watch)
        if deadline < self._sweep_at:
            self._sweep_at = deadline
            self._timer.set(deadline)

    def _deadline(self, watch: Watch) -> float:
        age = self._policy.deadline
        return NEVER if age is None else watch.started + age

    def _next_due(self, watch: Watch, age: float, price: float) -> float:
        """When to poll next, after a poll sent at *age* (0 after the submit)."""
        single, callbacks = self._policy.price, self._pacer.callbacks
        if watch.kind is Kind.CALLBACK:
            price = callbacks.price(price, single)
        elif watch.kind is Kind.CANARY:
            price = callbacks.canary_price(single)
        elif watch.failures is not None:  # it may have to be polled alone
            price = single
        due = watch.started + watch.schedule.next_age(age, price, watch.polls)
        return self._pacer.shared.on_beat(due, watch.started + age, len(self._live))

    def _first_due(self, watch: Watch) -> float:
        """When to poll a task that was just submitted."""
        due = self._next_due(watch, 0.0, self._pacer.shared.price(len(self._live)))
        deadline = self._deadline(watch)
        if due < deadline:
            return due
        # A poll half-way to so near a deadline is better than none.
        return max((watch.started + deadline) / 2, deadline - self._policy.min_interval)

    def _push(self, watch: Watch, due: float) -> None:
        """Poll *watch* at *due*; once more shortly before the deadline, never after it."""
        deadline = self._deadline(watch)
        if due >= deadline:
            due = deadline - self._policy.min_interval
            polled = watch.polls or watch.failures is not None
            if due <= self._clock.now() + (self._policy.min_interval if polled else 0.0):
                watch.due = NEVER  # the last poll before the deadline was already sent
                return
        self._queue.push(watch, due)
        if due < self._timer.at:
            self._timer.set(due)

    def _hurry(self, watch: Watch, due: float) -> None:
        """Poll *watch* at *due* at the latest."""
        if due < watch.due:
            self._push(watch, due if due > self._clock.now() else AT_ONCE)

    # -- the loop --------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do what there is to do now, and set the timer for what comes next."""
        try:
            self._timer.set(self._do_what_is_due())
        except Exception as exc:  # noqa: BLE001 - it must not die silently
            self._crash(exc)

    def _do_what_is_due(self) -> float:
        """Send the polls that are due; returns when there is more to do."""
        self.notice_resume()
        now = self._clock.now()
        if self._sweep_at <= now:
            self._give_up_late(now)
        while self._may_poll(now) and (watches := self._take(now)):
            self._send(watches)
            if self._contended is not None:
                return AT_ONCE  # sending it changes what the rate allows
        if logger.isEnabledFor(logging.DEBUG):
            self._log_wait(now)
        if len(self._in_flight) >= self._max_reads:
            return self._sweep_at
        return min(self._sweep_at, max(self._first_queued(), self._ready_at()))

    def _may_poll(self, now: float) -> bool:
        if len(self._in_flight) >= self._max_reads:
            return False
        return self._ready_at() <= now or (self._contended is not None and self._contended())

    def _first_queued(self) -> float:
        return min(self._queue.first_due(), self._queue.first_due(single=True))

    def _log_wait(self, now: float) -> None:
        """Say why nothing is polled although something is due."""
        if self._first_queued() > now:
            return
        if len(self._in_flight) >= self._max_reads:
            logger.debug("polls wait: %d are in flight, the most there may be", self._max_reads)
        else:
            wait = self._ready_at() - now
            logger.debug("polls wait %.2f s for the cool-down or the request rate", wait)

    def _give_up_late(self, now: float) -> None:
        """End what is past its deadline, be it queued, in flight or held up."""
        for watch in [watch for watch in self._live.values() if self._deadline(watch) <= now]:
            self._end(watch, watch.timed_out(self._policy.deadline))
        first = min((self._deadline(watch) for watch in self._live.values()), default=NEVER)
        self._sweep_at = max(first, now + min(self._policy.min_interval, _SWEEP))

    def _take(self, now: float) -> list[Watch]:
        """The watches of the next poll: those due first, due or not, as many as it can ask for.

        If the first was nudged or is a canary, only those that are due: the others wait for
        callbacks of their own.
        """
        queue = self._queue
        first = queue.first()
        if queue.first_due(single=True) <= min(now, NEVER if first is None else first.due):
            return [queue.pop(single=True)]
        if first is None or first.due > now:
            return []
        limit = self._network.read_limit
        self._pacer.shared.limit = limit
        if first.failures is not None:
            limit = first.failures.most_together(limit)
        out_of_turn = first.nudged or first.kind is Kind.CANARY
        watches: list[Watch] = []
        taken: list[tuple[float, float]] = []
        while len(watches) < limit and (watch := queue.first()) is not None:
            if out_of_turn and watch.due > now and not first.kind is watch.kind is Kind.CANARY:
                break
            taken.append((watch.polled, watch.due))
            watches.append(queue.pop())
        if not out_of_turn:
            self._pacer.shared.saw_read(now, taken)
        return watches

    def _send(self, watches: list[Watch]) -> None:
        """Poll *watches* in one request."""
        poll = asyncio.ensure_future(self._network.fetch(tuple([w.id for w in watches])))
        self._in_flight.add(poll)
        poll.add_done_callback(partial(self._answered, watches))

    def _answered(self, watches: list[Watch], poll: asyncio.Future[PollResult]) -> None:
        """Handle the result of a poll."""
        if len(self._in_flight) >= self._max_reads:
            self._timer.set(AT_ONCE)  # other polls waited for it to end
        self._in_flight.discard(poll)
        if poll.cancelled():
            if not self._timer.closed:
                self._crash(asyncio.CancelledError("cancelled by others"))
            return
        try:
            self._apply(watches, poll.result())
            self.notice_resume()
        except Exception as exc:  # noqa: BLE001 - it must not die silently
            self._crash(exc)

    # -- answers ---------------------------------------------------------------------------

    def _apply(self, watches: list[Watch], result: PollResult) -> None:
        answers = result.answers
        failed = [answer for answer in answers.values() if isinstance(answer, EvolinkError)]
        if self._suspended.retry:
            self._suspended.retry = False
            if any(isinstance(error, APIConnectionError) for error in failed):
                # The first poll after the machine slept went out on a dead connection.
                for watch in watches:
                    if watch.due == IN_FLIGHT:
                        self._push(watch, AT_ONCE)
                return
        if failed:
            logger.warning(
                "a poll failed for %d of %d tasks: %s", len(failed), len(watches), failed[0]
            )
        single = len(watches) == 1
        if not single and answers:
            failure = failed[0] if len(failed) == len(answers) else None
            self._batch_polls.add(failure, sent_at=result.sent_at)
        price = self._pacer.shared.price(len(self._live))
        for watch in watches:
            if watch.due != IN_FLIGHT:  # it was given up meanwhile
                continue
            answer = answers.get(watch.id)
            if answer is None:
                if watch.id in answers:
                    self._left_out(watch)
                else:
                    self._push(watch, AT_ONCE)
                continue
            if isinstance(answer, TaskSnapshot):
                self._saw(watch, answer, result, price, single=single)
            else:
                self._failed(watch, answer, result, single=single)
            callers = watch.callers
            if callers is None:
                continue
            if callers.again and not watch.ended:  # asked for since: poll once more
                callers.again = False
                self._push(watch, AT_ONCE)
            else:
                wake_all(callers.poll)

    def _saw(
        self,
        watch: Watch,
        snapshot: TaskSnapshot,
        result: PollResult,
        price: float,
        *,
        single: bool,
    ) -> None:
        """Note that a task was seen."""
        before, watch.snapshot = watch.snapshot, snapshot
        started, sent_at, last = watch.started, result.sent_at, watch.polled
        watch.polled = sent_at
        if watch.failures is not None:
            watch.failures = watch.failures.after_answer(single=single)
        # Tasks of unknown age, and what was seen across a suspension, teach nothing.
        teaches = watch.kind is not Kind.ATTACHED and last >= self._suspended.resumed_at
        if snapshot.status in TERMINAL:
            if teaches:
                age = result.received_at - started
                watch.schedule.saw_end(last - started, age, snapshot.duration)
            self._end(watch)
            return
        age = sent_at - started
        if teaches:
            watch.schedule.saw_running(last - started, age)
        watch.polls += 1
        due = self._next_due(watch, age, price)
        watch.nudged = False
        callers = watch.callers
        if callers is not None and callers.nudged:
            watch.nudged, callers.nudged = True, False
            due = min(due, sent_at + self._policy.min_interval)
        self._push(watch, max(due, result.received_at))
        status, unknown = snapshot.status, self._unknown_statuses
        if status not in RUNNING and status not in unknown and len(unknown) < _STATUSES_LOGGED:
            unknown.add(status)
            logger.warning("unknown task status %s: treated as running", printable(status, 60))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "task %s is %s at %s %%, %s",
                watch.id,
                printable(snapshot.status, 60),
                snapshot.progress,
                self._plan(watch, result.received_at),
            )
        if callers is not None and callers.change and differs(before, snapshot):
            wake_all(callers.change)

    def _left_out(self, watch: Watch) -> None:
        """Note that a batch answer left a task out."""
        failures = watch.failures = watch.failures or Failures()
        single = failures.miss(may_lag=self._may_lag(watch))
        logger.debug(
            "task %s: left out by a batch answer, %d in a row", watch.id, failures.left_out
        )
        if single:
            self._push(watch, AT_ONCE)
        else:
            self._retry(watch, failures.left_out)

    def _failed(
        self, watch: Watch, error: EvolinkError, result: PollResult, *, single: bool
    ) -> None:
        """Note that a poll failed; only a confirmed refusal ends the watch."""
        failures = watch.failures = watch.failures or Failures()
        now = self._clock.now()
        confirmed = single and failures.confirms(error, now=now, may_lag=self._may_lag(watch))
        failures.add(error, sent_at=result.sent_at)
        if confirmed:
            self._end(watch, error)
            return
        if not (single or error.is_throttle) and failures.suspect(self._batch_polls):
            logger.debug("task %s: polled singly, batch polls with it fail", watch.id)
        self._retry(watch, failures.count)
        if logger.isEnabledFor(logging.DEBUG):
            plan = self._plan(watch, now, self._ready_at())
            logger.debug("polling task %s failed, %s: %s", watch.id, plan, error)

    def _retry(self, watch: Watch, failures: int) -> None:
        wait = max(self._network.backoff(failures), self._policy.min_interval)
        self._push(watch, self._clock.now() + wait)

    def _may_lag(self, watch: Watch) -> bool:
        """True if a task may only be too new for a replica that does not know it."""
        return watch.request is not None and self._clock.now() - watch.started < _REPLICA_LAG

    def _plan(self, watch: Watch, now: float, ready_at: float = -math.inf) -> str:
        """What comes next for a task that was just polled, in words."""
        if watch.due < NEVER:
            return f"next poll in {max(watch.due, ready_at) - now:.2f} s"
        return f"no poll before its deadline in {self._deadline(watch) - now:.2f} s"

    def notice_resume(self) -> None:
        """Notice that the machine was suspended; then poll all tasks on new connections."""
        if slept := self._suspended.seconds():
            logger.warning("the machine was suspended for about %.0f s", slept)
            self._network.renew()
            now = self._clock.now()
            for watch in self._live.values():
                self._hurry(watch, now)

    # -- ends ------------------------------------------------------------------------------

    def _end(self, watch: Watch, reason: EvolinkError | None = None) -> None:
        watch.reason, watch.due = reason, NEVER
        watch.schedule.left()
        del self._live[watch.id]
        self._pacer.callbacks.canaries -= watch.kind is Kind.CANARY
        if not self._live:
            self._sweep_at = NEVER
            self._timer.set(NEVER)
        if reason is None:
            self._count_callback(watch)
            logger.debug("task %s ended", watch.id)
        if (callers := watch.callers) is not None:
            for futures in (callers.end, callers.change, callers.poll):
                wake_all(futures)
        if watch.on_end is not None:
            watch.on_end()
            watch.on_end = None

    def _count_callback(self, watch: Watch) -> None:
        """Learn whether callbacks come; once they stop, do not wait for the others."""
        callbacks = self._pacer.callbacks
        if watch.nudged:
            callbacks.saw_callback()
        elif watch.kind in {Kind.CALLBACK, Kind.CANARY}:
            now = self._clock.now()
            if callbacks.saw_missed(now, pause=self._policy.max_interval / 4):
                price = self._pacer.shared.price(len(self._live))
                for other in self._live.values():
                    if other.kind is Kind.CALLBACK and other.failures is None:
                        age = other.polled - other.started
                        self._hurry(other, max(now, self._next_due(other, age, price)))

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
            self._end(watch, watch.crashed(crash))
