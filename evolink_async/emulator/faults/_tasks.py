"""Faults of tasks, how a generation goes and what the API says about it, and of callbacks."""

from __future__ import annotations

import math

from attrs import evolve, field, frozen

from evolink_async.emulator._rules import LONGEST, NAME, SECONDS, TEXT, number, whole
from evolink_async.emulator._tasks import Timeline
from evolink_async.emulator.faults._fault import SHARE, Fault

__all__ = [
    "CallbackDelayed",
    "CallbackDropped",
    "CallbackDuplicated",
    "CallbackFault",
    "CallbackForged",
    "CallbackReordered",
    "FewerResults",
    "ProgressFallsBack",
    "TaskCancelled",
    "TaskFails",
    "TaskFault",
    "TaskHangs",
    "TaskLags",
    "TaskVanishes",
    "UnknownStatus",
]


@frozen
class TaskFault(Fault):
    """Changes the timeline of a task when it is accepted; with ``task``, of one that runs."""

    def check_together(self) -> None:
        if self.route is not None:
            self._refuse("route", "a task has no route; use prompt, task or nth")
        if self.task is not None:
            self._check_strikes_now()

    def _check_strikes_now(self) -> None:
        for name in ("prompt", "nth", "times", "between"):
            if getattr(self, name) is not None:
                self._refuse(name, "with task the fault strikes that one task, at once")
        if self.rate != 1:
            self._refuse("rate", "with task the fault strikes that one task, at once")

    def adjust(self, timeline: Timeline) -> Timeline:
        """The timeline the task has instead."""
        raise NotImplementedError


def _moment(timeline: Timeline, at: float) -> float:
    """The time at which the share *at* of the generation is over."""
    lasts = timeline.ends_at - timeline.starts_at
    return timeline.ends_at if math.isinf(lasts) else timeline.starts_at + at * lasts


@frozen
class TaskFails(TaskFault):
    """The generation fails. ``TaskFails("content_policy_violation", prompt="forbidden")``.

    Args:
        code: The task error's code, documented or not.
        message: The task error's message.
        at: The share of the generation after which it happens.
    """

    code: str = field(default="service_error", validator=NAME)
    message: str = field(default="a fault you asked for", validator=TEXT)
    at: float = field(default=0.5, kw_only=True, validator=SHARE)

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(
            timeline,
            status="failed",
            ends_at=_moment(timeline, self.at),
            error_code=self.code,
            error_message=self.message,
        )


@frozen
class TaskCancelled(TaskFault):
    """The generation is cancelled. ``TaskCancelled(0.3, nth=2)``.

    Args:
        at: The share of the generation after which it happens.
    """

    at: float = field(default=0.5, validator=SHARE)

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(
            timeline,
            status="cancelled",
            ends_at=_moment(timeline, self.at),
            error_code="request_cancelled",
            error_message="the request was cancelled",
        )


@frozen
class TaskHangs(TaskFault):
    """The generation never ends. ``TaskHangs(40, prompt="slow")``.

    Args:
        progress: The percentage at which it stays.
    """

    progress: int = field(default=50, validator=whole(0, 100))

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(timeline, ends_at=float("inf"), stuck_at=self.progress)


@frozen
class TaskVanishes(TaskFault):
    """The API forgets the task: 404 from then on. ``TaskVanishes(0.5, nth=2)``.

    Args:
        at: The share of the generation after which it happens.
    """

    at: float = field(default=0.5, validator=SHARE)

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(timeline, vanishes_at=_moment(timeline, self.at))


@frozen
class TaskLags(TaskFault):
    """The API answers 404 at first, as a replica that lags behind. ``TaskLags(30.0)``.

    Args:
        seconds: How long, in emulated seconds after the submit.
    """

    seconds: float = field(default=30.0, validator=number(0, LONGEST, above=True))

    def check_together(self) -> None:
        super().check_together()
        if self.task is not None:
            self._refuse("task", "the id is not known yet when it strikes; use prompt or nth")

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(timeline, lag=self.seconds)


@frozen
class ProgressFallsBack(TaskFault):
    """The progress goes back in the second half. ``ProgressFallsBack(prompt="odd")``."""

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(timeline, falls_back=True)


@frozen
class UnknownStatus(TaskFault):
    """The status while processing is a new word. ``UnknownStatus("moderating")``.

    Args:
        word: The status word.
    """

    word: str = field(default="moderating", validator=NAME)

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(timeline, word=self.word)


@frozen
class FewerResults(TaskFault):
    """Fewer pictures than ordered, and fewer charged. ``FewerResults(1, prompt="four")``.

    Args:
        made: How many there are.
    """

    made: int = field(default=1, validator=whole(0, 3))

    def adjust(self, timeline: Timeline) -> Timeline:
        return evolve(timeline, made=min(self.made, timeline.made))


@frozen
class CallbackFault(Fault):
    """Changes how the callback of a task is sent, decided when it is due."""

    def check_together(self) -> None:
        if self.route is not None:
            self._refuse("route", "a callback goes to no route; use prompt, task or nth")


@frozen
class CallbackDropped(CallbackFault):
    """The callback is never sent. ``CallbackDropped(rate=0.5)``."""


@frozen
class CallbackDelayed(CallbackFault):
    """The callback comes late. ``CallbackDelayed(120.0, prompt="lake")``.

    Args:
        seconds: How late, in emulated seconds.
    """

    seconds: float = field(default=30.0, validator=SECONDS)


@frozen
class CallbackDuplicated(CallbackFault):
    """The callback comes again and again. ``CallbackDuplicated(3)``.

    Args:
        copies: How many times it is sent in all.
    """

    copies: int = field(default=2, validator=whole(2, 1000))


@frozen
class CallbackReordered(CallbackFault):
    """The callback is sent after the next task's. ``CallbackReordered(nth=1)``.

    If no other follows within *seconds* of emulated time, it is sent then.

    Args:
        seconds: How long it waits for another.
    """

    seconds: float = field(default=60.0, validator=SECONDS)


@frozen
class CallbackForged(CallbackFault):
    """A forged callback comes first. ``CallbackForged("completed", prompt="lake")``.

    It is sent as soon as the task is accepted, and says that the running task has ended.

    Args:
        status: The status it claims.
        url: The result it claims.
    """

    status: str = field(default="completed", validator=NAME)
    url: str = field(default="https://attacker.example/picture.png", validator=TEXT)

    def check_together(self) -> None:
        super().check_together()
        if self.task is not None:
            self._refuse("task", "the id is not known yet when it is sent; use prompt or nth")
