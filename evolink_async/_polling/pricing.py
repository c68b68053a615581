"""What a poll may cost: shared by the tasks of a request, or spared by callbacks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from attrs import define, field

from evolink_async._polling.durations import (
    AgeGrid,
    DurationModel,
)
from evolink_async._polling.policy import (
    Backoff,
    PollPolicy,
    Schedule,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence


__all__ = ["CallbackTrust", "Pacer", "SharedReads"]

FIRST_USEFULNESS: Final = 0.5
USEFULNESS_RATE: Final = 0.1
BEAT: Final = 2.5
"""Shortest intervals from one burst of reads to the next."""


MODELS_KEPT: Final = 64


@define(eq=False)
class SharedReads:
    """What a seat in a shared read costs: the price of a read over its useful seats.

    A read takes the earliest-due tasks along, due or not. How useful that is to each is
    the part of its interval that has passed, cubed. The running mean of it over the seats
    of a read, times the seats a read can have, is the share: the price of a seat is the
    price of a read divided by it. The watcher's loop::

        batch = the earliest-due tasks, up to limit
        shared.saw_read(now, [(task.polled, task.due) for task in batch])
        price = shared.price(running)
        for each task of the answer still running:
            due = task.submitted + schedule.next_age(now - task.submitted, price)
            task.due = shared.on_beat(due, now, running)

    Attributes:
        base_price: Seconds of delay that one read is worth.
        limit: Most tasks in one read; 1 where reads cannot be shared.
        min_interval: Least seconds from one look at a task to the next.
        max_interval: Most.
        beats: False where polls are to keep their own time.
        usefulness: Mean usefulness of a seat, from 0 to 1.
    """

    base_price: float
    limit: int = 50
    min_interval: float = 0.25
    max_interval: float = math.inf
    beats: bool = True
    usefulness: float = field(default=FIRST_USEFULNESS, init=False)

    def share(self, running: int) -> float:
        """Useful seats expected in a read while *running* tasks are watched."""
        return max(1.0, self.usefulness * min(self.limit, running))

    def price(self, running: int) -> float:
        """Seconds of delay that one seat is worth while *running* tasks are watched."""
        return self.base_price / self.share(running)

    def on_beat(self, due: float, polled: float, running: int) -> float:
        """When to look at a task due at *due*: then, or together with others due about then.

        A request by itself costs the machine twice what it costs in a burst. Where one
        request is not enough for all *running* tasks, those that follow each other closely
        go out on the same beat, half of them a little early, half a little late; but not
        sooner than the shortest interval after they were last *polled* at. Who would be
        polled at too late by that, or is read singly, keeps to *due*.
        """
        if running <= self.limit or self.limit == 1 or not self.beats:
            return due
        tempo = BEAT * self.min_interval
        beat = math.floor(due / tempo + 0.5) * tempo
        if beat < polled + self.min_interval:
            beat += tempo
        return beat if beat <= polled + self.max_interval else due

    def saw_read(self, now: float, tasks: Sequence[tuple[float, float]]) -> None:
        """A read is sent *now* for *tasks*, each given as (last poll, due)."""
        if len(tasks) > 1:
            usefulness = self.fill(now, tasks) / len(tasks)
            self.usefulness += USEFULNESS_RATE * (usefulness - self.usefulness)

    @staticmethod
    def fill(now: float, tasks: Iterable[tuple[float, float]]) -> float:
        """Useful places of a read sent *now* for *tasks*, each given as (last poll, due)."""
        total = 0.0
        for polled, due in tasks:
            if now >= due:
                total += 1
            elif now > polled:
                total += ((now - polled) / (due - polled)) ** 3
        return total


@define(eq=False)
class CallbackTrust:
    """How often a completion is found by a look because its callback did not come.

    Looks at a task with a callback are priced by it: hardly any while callbacks come,
    plain polling by itself once they stop.

    Attributes:
        missed: The running share of completions without a callback, from 0.01 to 1.
        heard: Callbacks that came.
    """

    missed: float = field(default=0.01, init=False)
    heard: int = field(default=0, init=False)

    def price(self, price: float) -> float:
        """Price of a look at a task whose end should be told by a callback."""
        return price / self.missed

    def saw_callback(self) -> None:
        """A completion was told by its callback."""
        self.heard += 1
        self.missed = max(0.01, self.missed * 0.95)

    def saw_missed(self) -> None:
        """A completion was found by a look, without a callback."""
        self.missed += 0.3 * (1 - self.missed)


@define(eq=False)
class Pacer:
    """All that one session knows about when to look: a schedule per kind of task.

    Schedules are kept for the `MODELS_KEPT` kinds used last.
    """

    policy: PollPolicy
    shared: SharedReads = field(init=False)
    callbacks: CallbackTrust = field(init=False, factory=CallbackTrust)
    _grid: AgeGrid = field(init=False)
    _models: dict[Hashable, Schedule] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        policy = self.policy
        self.shared = SharedReads(
            policy.price,
            min_interval=policy.min_interval,
            max_interval=policy.max_interval,
            beats=policy.wait is None,
        )
        self._grid = AgeGrid.of(self.policy)

    def model(self, key: Hashable, estimate: object = None) -> Schedule:
        """The schedule of tasks of kind *key*, such as (endpoint, model).

        *estimate* is the server's ``estimated_time`` as it came, junk included; it only
        counts where the kind is new.
        """
        schedule = self.known(key) or self._new(estimate)
        self._models[key] = schedule
        if len(self._models) > MODELS_KEPT:
            del self._models[next(iter(self._models))]
        return schedule

    def known(self, key: Hashable) -> Schedule | None:
        """The schedule of tasks of kind *key* if there is one, which thereby is used last."""
        schedule = self._models.pop(key, None)
        if schedule is not None:
            self._models[key] = schedule
        return schedule

    def _new(self, estimate: object) -> Schedule:
        if self.policy.wait is not None:
            return Backoff(self.policy)
        return DurationModel(self.policy, self._grid, estimate)

    @property
    def typical(self) -> dict[Hashable, float]:
        """Learned median seconds of each kind that has shown one."""
        learned = ((key, model.typical) for key, model in self._models.items())
        return {key: seconds for key, seconds in learned if seconds is not None}
