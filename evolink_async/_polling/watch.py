"""What is watched: tasks, the groups they are polled at in, and the order those are due in."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Final

from attrs import define, field

from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import Page, TaskSnapshot
from evolink_async._polling.policy import Schedule
from evolink_async.errors import EvolinkError

__all__ = ["READING", "Cohort", "DueQueue", "Futures", "Group", "Trouble", "Watch"]

READING: Final = math.nextafter(-math.inf, 0.0)
"""In place of a due time: a read is in the air."""

Futures = list["asyncio.Future[None]"]


@define(eq=False)
class Cohort:
    """Tasks of one kind, submitted at about the same time, which are polled at alike.

    Attributes:
        schedule: When to look at tasks of their kind.
        started: When they were submitted: the first of them, and nearly all.
        deadline: When the first of them is given up.
        teaches: True if what is seen of them says how long tasks of their kind take.
        calls_back: True if a callback is to tell when they have ended.
        sentinel: True for one polled at like any other although it calls back, to notice
            callbacks that stop.
        unread: Those that wait for their first look together, while others may join them.
    """

    schedule: Schedule
    started: float
    deadline: float
    teaches: bool = True
    calls_back: bool = False
    sentinel: bool = False
    unread: Group | None = None


@define(eq=False, weakref_slot=False)  # with many tasks running there are many of them
class Group:
    """Tasks of one cohort that were last polled at together, and are due together.

    What a look says of nearly all of them, that they go on, is noted once for all.

    Attributes:
        cohort: What they belong to.
        polled: When they were last polled at, on the session's clock; before the first look
            when they were submitted.
        watches: The tasks; who is polled at by itself, or has ended, leaves.
        due: When they are polled at next, `READING` while a read of them is in the air.
        polls: How often they were polled at.
        page: What the last look said of all of them, None if it was not one for all.
        own: True if some have a snapshot of their own, which the next page replaces.
        plain: True if an answer that they go on is no news to anybody.
    """

    cohort: Cohort
    polled: float
    watches: list[Watch] = field(factory=list)
    due: float = math.inf
    polls: int = 0
    page: Page | None = None
    own: bool = True
    plain: bool = True

    def split(self, count: int) -> Group:
        """All but the first *count*, as a group of their own."""
        rest = Group(
            self.cohort,
            self.polled,
            self.watches[count:],
            polls=self.polls,
            page=self.page,
            own=self.own,
            plain=self.plain,
        )
        del self.watches[count:]
        for watch in rest.watches:
            watch.group = rest
        return rest

    def join(self, other: Group) -> None:
        """Take in those of *other*, which are polled at together with these."""
        for watch in other.watches:
            watch.group = self
        self.watches += other.watches
        self.own = self.own or other.own
        other.watches = []

    def saw(self, page: Page, polled: float) -> None:
        """Note that all go on, by the answer to a read sent when they were *polled* at."""
        if self.own:
            for watch in self.watches:
                watch.seen = None
            self.own = False
        self.page, self.polled, self.plain = page, polled, True
        self.polls += 1


@define(eq=False)
class Watch:
    """One task under watch, from its submit (or `Session.task`) to its end.

    Attributes:
        id: The task's id.
        started: When it was submitted, or picked up by its id.
        deadline: When it is given up.
        group: The tasks it is polled at with.
        request: What was submitted, None if it was not this session that did.
        idempotency_key: The key it was submitted with.
        seen: What was last read of it alone; None if its group's page says it.
        reason: Why it was given up before a terminal state; None if it was not.
        on_end: Called once it has ended.
        ended: True once nothing more will be read.
        again: True if a look was asked for while one was in the air.
        alone: True while it must be read singly.
        spoiled: How often it had to be because batch reads with it failed, others not, since
            one with it was answered.
        missing: Batch answers in a row that left it out.
        nudged: True once something told that it has ended.
        called: True if something did while a read was in the air.
        trouble: Its failed reads in a row.
        waiters: Who waits for its end.
        listeners: Who waits for news.
        lookers: Who waits for the next look.
    """

    id: str
    started: float
    deadline: float
    group: Group
    request: ImageRequest | RawRequest | None = None
    idempotency_key: str | None = None
    seen: TaskSnapshot | None = None
    reason: EvolinkError | None = None
    on_end: Callable[[], None] | None = None
    ended: bool = False
    again: bool = False
    alone: bool = False
    spoiled: int = 0
    missing: int = 0
    nudged: bool = False
    called: bool = False
    trouble: Trouble | None = None
    waiters: Futures | None = None
    listeners: Futures | None = None
    lookers: Futures | None = None

    @property
    def cohort(self) -> Cohort:
        """The tasks it is polled at like."""
        return self.group.cohort

    @property
    def snapshot(self) -> TaskSnapshot | None:
        """What was last read, None before the first answer."""
        if self.seen is None and self.group.page is not None:
            self.seen = self.group.page.snapshot(self.id)
            self.group.own = True
        return self.seen

    @property
    def last_error(self) -> EvolinkError | None:
        """Why the last read failed, None if it did not."""
        return self.trouble.error if self.trouble is not None else None

    @property
    def plain(self) -> bool:
        """True if an answer that it goes on is no news to anybody."""
        return not (
            self.trouble
            or self.nudged
            or self.missing
            or self.spoiled
            or self.again
            or self.lookers is not None
            or self.listeners is not None
        )

    def leave(self) -> Group:
        """Leave its group for one of its own, which is returned; nothing else is changed."""
        group = self.group
        if group.cohort.unread is group:
            group.cohort.unread = None
        if len(group.watches) > 1:
            group.watches.remove(self)
            self.group = Group(
                group.cohort,
                group.polled,
                [self],
                due=group.due,
                polls=group.polls,
                page=group.page,
                own=group.own,
            )
        self.group.plain = False
        return self.group

    def end(self) -> None:
        """Nothing more will be read; nothing is kept of those it was polled at with."""
        self.leave().watches.clear()
        self.ended = True


@define
class Trouble:
    """Failed reads of one task in a row.

    Attributes:
        error: The last one.
        since: When the first was sent.
        failures: How many.
        throttled: How many of them only asked for patience.
        strikes: How many of them were the same final refusal.
        struck_at: When the first of these was.
    """

    error: EvolinkError
    since: float
    failures: int = 0
    throttled: int = 0
    strikes: int = 0
    struck_at: float = 0.0


_Entry = tuple[float, int, Group]


class DueQueue:
    """Groups by when they are due, earliest first.

    A group is due once: queued anew, or emptied, what was queued before counts no more.
    """

    def __init__(self) -> None:
        """An empty queue."""
        self._heap: list[_Entry] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        """How many entries are kept, those that count no more among them."""
        return len(self._heap)

    def __iter__(self) -> Iterator[Group]:
        """The groups that are due, in no order."""
        return iter([group for due, _, group in self._heap if group.due == due and group.watches])

    def push(self, group: Group, due: float) -> None:
        """*group* is due at *due*, no more at any other time."""
        group.due = due
        heapq.heappush(self._heap, (due, next(self._order), group))

    def first(self) -> Group | None:
        """The group that is due first, None if there is none."""
        heap = self._heap
        while heap:
            due, _, group = heap[0]
            if group.due == due and group.watches:
                return group
            heapq.heappop(heap)
        return None

    def pop(self) -> Group:
        """Take off what `first` has just returned."""
        group = heapq.heappop(self._heap)[2]
        if group.cohort.unread is group:
            group.cohort.unread = None
        return group

    def compact(self) -> None:
        """Drop what counts no more, which would keep it in memory."""
        self._heap = [e for e in self._heap if e[2].due == e[0] and e[2].watches]
        heapq.heapify(self._heap)

    def clear(self) -> list[Group]:
        """Take off all; returns those that were due."""
        groups = list(self)
        self._heap.clear()
        return groups
