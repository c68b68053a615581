"""What a poll may cost: shared by the tasks of a request, or spared by callbacks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from attrs import define, field

from evolink_async._polling.durations import DurationModel
from evolink_async._polling.policy import Backoff, PollPolicy, Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["Callbacks", "Pacer", "SharedReads"]

BEAT: Final = 2.5
"""Shortest intervals from one burst of reads to the next."""

LEAST_MISSED: Final = 0.01
"""Share of callbacks taken to be missed when none is."""

CANARY_EVERY: Final = (16, 128)
"""One in so many tasks is a canary: until callbacks have proven to come, and afterwards."""

PROVEN: Final = 32
"""Callbacks that came from which others are expected to come as well."""

CANARY_USEFULNESS: Final = 0.5
"""What part of a canary's poll is useful when all canaries are polled together."""

FEW_MISSED: Final = 0.3
"""Share of missed callbacks up to which polls of tasks with callbacks share no price."""

MODELS_KEPT: Final = 64
"""Kinds of tasks that a session keeps a schedule for."""


@define(eq=False)
class SharedReads:
    """What a poll costs where one read polls many tasks.

    A request polls the tasks due first, due or not. How useful that is to a task is the part
    of its interval that has passed, cubed. The running mean of it, times the tasks in one
    request, is the number of tasks that share its price.

    Attributes:
        policy: The session's settings. Its price is that of one request.
        limit: Most tasks in one request; 1 if requests cannot be shared.
        usefulness: Mean usefulness of a place in a request, from 0 to 1.
    """

    policy: PollPolicy
    limit: int = 50
    usefulness: float = field(default=0.5, init=False)

    def price(self, running: int) -> float:
        """Seconds of delay that one poll is worth while *running* tasks are watched."""
        return self.policy.price / max(1.0, self.usefulness * min(self.limit, running))

    def on_beat(self, due: float, polled: float, running: int) -> float:
        """When to poll a task due at *due*: then, or together with others due about then.

        A request costs the machine half as much in a burst as alone. Where one read is not
        enough for all *running* tasks, due times are rounded to beats, so that reads go out
        in bursts. A beat is no sooner than the shortest interval after the task was last
        *polled*, and *due* stands where a beat would exceed the longest interval.
        """
        if running <= self.limit or self.limit == 1 or self.policy.wait is not None:
            return due
        tempo = BEAT * self.policy.min_interval
        beat = math.floor(due / tempo + 0.5) * tempo
        if beat < polled + self.policy.min_interval:
            beat += tempo
        return beat if beat <= polled + self.policy.max_interval else due

    def saw_read(self, now: float, tasks: Sequence[tuple[float, float]]) -> None:
        """A read is sent *now* for *tasks*, each given as (last poll, due)."""
        if len(tasks) < 2:
            return
        useful = 0.0
        for polled, due in tasks:
            if now >= due:
                useful += 1
            elif now > polled:
                useful += ((now - polled) / (due - polled)) ** 3
        self.usefulness += 0.1 * (useful / len(tasks) - self.usefulness)


@define(eq=False)
class Callbacks:
    """Whether callbacks come, and what a poll of a task that should send one may cost.

    While they come there are hardly any polls, once they stop there are as many as without
    them. Some of many tasks, the canaries, are polled all the same, to notice that they stop.

    Attributes:
        missed: The running share of ends without a callback, from `LEAST_MISSED` to 1.
        heard: Callbacks that came.
        canaries: Canaries that are watched now.
    """

    missed: float = field(default=LEAST_MISSED, init=False)
    heard: int = field(default=0, init=False)
    canaries: int = field(default=0, init=False)
    _submitted: int = field(default=0, init=False)
    _hurried_at: float = field(default=-math.inf, init=False)

    def choose_canary(self, watched: int) -> bool:
        """Whether the task submitted now is a canary, while *watched* others run.

        Only where many run, which would all wait for callbacks that may never come: a lone
        task teaches as much by the first callback that is missed.
        """
        self._submitted += 1
        every = CANARY_EVERY[self.heard >= PROVEN]
        return self._submitted % every == 0 and watched >= every // 2

    def canary_price(self, single: float) -> float:
        """Price of polling a canary, where *single* is that of a poll by itself."""
        return single / max(1.0, CANARY_USEFULNESS * self.canaries)

    def price(self, shared: float, single: float) -> float:
        """Price of polling any other task that should send a callback.

        While callbacks come, hardly two such tasks are due together, so that they pay the
        price of a *single* poll, not a *shared* one.
        """
        part = min(1.0, self.missed / FEW_MISSED)
        return (part * shared + (1 - part) * single) / self.missed

    def saw_callback(self) -> None:
        """A callback came at the end of a task."""
        self.heard += 1
        self.missed = max(LEAST_MISSED, self.missed * 0.95)

    def saw_missed(self, now: float, *, pause: float) -> bool:
        """A poll found an end without a callback; True if callbacks seem to stop just now.

        At most once in *pause* seconds.
        """
        before = self.missed
        self.missed += 0.3 * (1 - before)
        if self.missed <= 2 * before or now < self._hurried_at + pause:
            return False
        self._hurried_at = now
        return True


@define(eq=False)
class Pacer:
    """All that one session knows about when to poll.

    Attributes:
        policy: The session's settings.
        shared: What a poll costs where reads are shared.
        callbacks: Whether callbacks come.
    """

    policy: PollPolicy
    shared: SharedReads = field(init=False)
    callbacks: Callbacks = field(init=False, factory=Callbacks)
    _models: dict[str, Schedule] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.shared = SharedReads(self.policy)

    def model(self, key: str, estimate: object = None) -> Schedule:
        """The schedule of tasks of kind *key*, such as an endpoint and a model.

        *estimate* is the server's ``estimated_time`` as it came, junk included; it only
        counts where the kind is new. The schedules of the `MODELS_KEPT` kinds used last
        are kept.
        """
        schedule = self._models.pop(key, None)
        if schedule is None:
            learns = self.policy.wait is None
            schedule = DurationModel(self.policy, estimate) if learns else Backoff(self.policy)
        self._models[key] = schedule
        if len(self._models) > MODELS_KEPT:
            del self._models[next(iter(self._models))]
        return schedule

    @property
    def typical(self) -> dict[str, float]:
        """Learned median seconds of each kind, once a task of it has ended."""
        learned = ((key, model.typical) for key, model in self._models.items())
        return {key: seconds for key, seconds in learned if seconds is not None}
