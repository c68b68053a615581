"""What the watcher works with: the network it polls, a `Watch` per task, the queue of due times."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from typing import Final, Protocol

from attrs import define, field

from evolink_async._clock import NEVER
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import TaskSnapshot
from evolink_async._polling.failures import Failures
from evolink_async._polling.policy import Schedule
from evolink_async.errors import EvolinkError, TaskTimeoutError

__all__ = [
    "IN_FLIGHT",
    "Callers",
    "DueQueue",
    "Futures",
    "Kind",
    "Network",
    "PollResult",
    "Watch",
    "differs",
    "wait_in",
    "wake_all",
]

IN_FLIGHT: Final = -math.inf
"""The due time of a task while a poll of it is in flight."""

_COMPACT_FROM: Final = 60
"""Entries from which a queue drops its outdated ones."""


Futures = list["asyncio.Future[None]"]


class PollResult(Protocol):
    """What came of one poll: by id a task, an error, or None for an id that was left out.

    An id that is absent from the answers is polled again at once.
    """

    @property
    def sent_at(self) -> float: ...
    @property
    def received_at(self) -> float: ...
    @property
    def answers(self) -> Mapping[str, TaskSnapshot | EvolinkError | None]: ...


class Network(Protocol):
    """What the watcher needs of a transport."""

    @property
    def read_limit(self) -> int:
        """Tasks one poll may ask for now."""
        ...

    def fetch(self, ids: tuple[str, ...]) -> Awaitable[PollResult]:
        """Poll tasks once; never fails for an id. Changes `read_limit` at once, if at all."""
        ...

    def backoff(self, failures: int) -> float:
        """Seconds until a task whose polls failed so often in a row is polled again."""
        ...

    def renew(self) -> None:
        """Use new connections from now on."""
        ...


class Kind(Enum):
    """How a task came to be watched, and how its end will be known."""

    POLLED = "submitted here: polls alone say when it has ended"
    CALLBACK = "submitted here: a callback should say when it has ended"
    CANARY = "the same, but polled like others to notice when callbacks stop coming"
    ATTACHED = "picked up at an unknown age: nothing is learned from its duration"


@define(eq=False)
class Callers:
    """The callers that wait for one task.

    Attributes:
        end: Those that wait for its end.
        change: Those that wait for another status or progress.
        poll: Those that wait for the next answer.
        again: True if a poll was asked for while one was in flight: poll again after it.
        nudged: True if a nudge came while a poll was in flight: poll again soon after it.
    """

    end: Futures = field(factory=list)
    change: Futures = field(factory=list)
    poll: Futures = field(factory=list)
    again: bool = False
    nudged: bool = False


@define(eq=False)
class Watch:
    """One task under watch, from its submit (or `Session.task`) to its end.

    Attributes:
        id: The task's id.
        started: When it was submitted, or picked up by its id.
        kind: How it came to be watched, and how its end will be known.
        schedule: When to poll tasks like it.
        request: What was submitted, None if this session did not submit it.
        idempotency_key: The key it was submitted with.
        on_end: Called once it has ended.
        snapshot: The newest one, None before the first answer.
        reason: Why it was given up before a terminal state; None if it was not.
        polled: When the last answered poll was sent; before the first one, *started*.
        polls: How many were answered.
        due: When to poll it next, `IN_FLIGHT` or `NEVER`.
        nudged: True if a nudge came since it was last seen running.
        failures: Its failed polls in a row, None if there are none.
        callers: The callers that wait for it, None before the first.
    """

    id: str
    started: float = field(kw_only=True)
    kind: Kind = field(kw_only=True)
    schedule: Schedule = field(kw_only=True)
    request: ImageRequest | RawRequest | None = None
    idempotency_key: str | None = None
    on_end: Callable[[], None] | None = None
    snapshot: TaskSnapshot | None = None
    reason: EvolinkError | None = None
    polled: float = field(init=False)
    polls: int = field(default=0, init=False)
    due: float = field(default=NEVER, init=False)
    nudged: bool = field(default=False, init=False)
    failures: Failures | None = field(default=None, init=False)
    callers: Callers | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.polled = self.started

    @property
    def ended(self) -> bool:
        """True once it is no longer polled."""
        return self.reason is not None or (self.snapshot is not None and self.snapshot.is_terminal)

    @property
    def last_error(self) -> EvolinkError | None:
        """Why the last poll failed, None if it did not."""
        return self.failures.error if self.failures is not None else None

    def make_callers(self) -> Callers:
        """`callers`, made at the first call."""
        self.callers = self.callers or Callers()
        return self.callers

    def timed_out(self, deadline: float | None) -> TaskTimeoutError:
        """Why it is given up at its *deadline*."""
        last = f"; the last poll failed: {self.last_error}" if self.last_error else ""
        return TaskTimeoutError(
            f"task {self.id} did not end within {deadline:g} s (PollPolicy.deadline){last}. "
            f"It may still be running: session.task({self.id!r}) picks it up again",
            task_id=self.id,
            snapshot=self.snapshot,
        )

    def crashed(self, crash: BaseException) -> EvolinkError:
        """Why it is given up after an unexpected error of the watcher."""
        reason = EvolinkError(
            f"watching task {self.id} stopped by an internal error ({crash!r}); "
            f"the task goes on: session.task({self.id!r}) picks it up again"
        )
        reason.__cause__ = crash
        return reason


def differs(seen: TaskSnapshot | None, new: TaskSnapshot) -> bool:
    """True if status or progress of *new* are not those of the one *seen* before."""
    return seen is None or (seen.status, seen.progress) != (new.status, new.progress)


_Heap = list[tuple[float, int, Watch]]


class DueQueue:
    """Watches by when they are due: one heap of those that share a poll, one of single polls.

    An entry is outdated if `Watch.due` has changed since; it is dropped when it comes to the top.
    """

    def __init__(self) -> None:
        """An empty queue."""
        self._heaps: tuple[_Heap, _Heap] = ([], [])
        self._order = itertools.count()
        self._compact_at = _COMPACT_FROM

    def __len__(self) -> int:
        """How many entries are kept, outdated ones included."""
        return sum(map(len, self._heaps))

    def push(self, watch: Watch, due: float) -> None:
        """Make *watch* due at *due*, and at no other time."""
        watch.due = due
        heap = self._heaps[watch.failures is not None and watch.failures.single]
        heapq.heappush(heap, (due, next(self._order), watch))
        if len(heap) > self._compact_at:
            self._compact()

    def first(self, *, single: bool = False) -> Watch | None:
        """The watch that is due first, None if there is none."""
        heap = self._heaps[single]
        while heap:
            due, _, watch = heap[0]
            if watch.due == due:
                return watch
            heapq.heappop(heap)
        return None

    def first_due(self, *, single: bool = False) -> float:
        """When the first watch is due."""
        watch = self.first(single=single)
        return NEVER if watch is None else watch.due

    def pop(self, *, single: bool = False) -> Watch:
        """Remove what `first` has just returned: a poll of it is in flight."""
        watch = heapq.heappop(self._heaps[single])[2]
        watch.due = IN_FLIGHT
        return watch

    def _compact(self) -> None:
        """Drop outdated entries: they would keep ended watches in memory."""
        for heap in self._heaps:
            heap[:] = [entry for entry in heap if entry[2].due == entry[0]]
            heapq.heapify(heap)
        self._compact_at = _COMPACT_FROM + 2 * len(self)


async def wait_in(futures: Futures) -> None:
    """Wait among *futures*; a cancelled waiter leaves no trace."""
    future = asyncio.get_running_loop().create_future()
    futures.append(future)
    try:
        await future
    finally:
        if future in futures:
            futures.remove(future)


def wake_all(futures: Futures) -> None:
    """Wake those that wait in *futures* now, and forget them."""
    for future in futures:
        if not future.done():
            future.set_result(None)
    futures.clear()
