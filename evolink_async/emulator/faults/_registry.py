"""The faults of one emulator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from attrs import define, evolve, field

from evolink_async.emulator._contract import Submission
from evolink_async.emulator._exchange import Exchange
from evolink_async.emulator._tasks import Timeline
from evolink_async.emulator.faults._fault import Armed, Fault
from evolink_async.emulator.faults._requests import RequestFault
from evolink_async.emulator.faults._tasks import CallbackFault, CallbackForged, TaskFault

__all__ = ["Faults"]

AnyFault = TypeVar("AnyFault", bound=Fault)
ChangeTimeline = Callable[[str, Callable[[Timeline, float], Timeline]], bool]
"""Changes the timeline of the task with this id, if it runs, and says whether it does."""


@define(eq=False)
class Faults:
    """The faults an emulator makes, in the order in which they were added."""

    _seed: int
    _started_at: float
    _change_timeline: ChangeTimeline
    _armed: list[Armed] = field(factory=list, init=False)
    _added: int = field(default=0, init=False)

    def add(self, *faults: Fault) -> None:
        """Make these *faults*, too, from now on.

        Raises:
            TypeError: Something that is no fault.
            ValueError: A task fault with ``task=`` for a task that does not run.
        """
        for fault in faults:
            _check_is_fault(fault)
            draw = random.Random(f"{self._seed}:fault:{self._added}")  # noqa: S311 - not secret
            armed = Armed(fault, draw, self._started_at)
            if isinstance(fault, TaskFault) and fault.task is not None:
                self._adjust_now(fault, fault.task)
                armed.struck = 1
            self._armed.append(armed)
            self._added += 1

    def _adjust_now(self, fault: TaskFault, task_id: str) -> None:
        def change(timeline: Timeline, now: float) -> Timeline:
            adjusted = fault.adjust(timeline)
            return evolve(adjusted, ends_at=max(now, adjusted.ends_at))

        name = type(fault).__name__
        try:
            running = self._change_timeline(task_id, change)
        except KeyError:
            raise ValueError(
                f"{name}: no task {task_id!r} has been accepted; "
                "prompt= and nth= choose among the tasks to come"
            ) from None
        if not running:
            raise ValueError(f"{name}: task {task_id!r} has ended; add the fault while it runs")

    def clear(self) -> None:
        """Make no more faults; tasks already accepted keep theirs."""
        self._armed = []

    @property
    def active(self) -> tuple[Fault, ...]:
        """The faults in place."""
        return tuple(armed.fault for armed in self._armed)

    def struck(self, fault: Fault) -> int:
        """How many times *fault* has struck."""
        return sum(armed.struck for armed in self._armed if armed.fault == fault)

    def of_request(self, exchange: Exchange) -> list[tuple[RequestFault, Armed]]:
        """The request faults that strike *exchange*, each with its state."""
        return [
            (fault, armed)
            for armed in self._armed
            if isinstance(fault := armed.fault, RequestFault)
            and (fault.route is None or exchange.route in fault.route)
            and fault.fits(exchange.task_ids, exchange.prompts)
            and armed.strikes(exchange.time)
        ]

    def adjust(self, submission: Submission, timeline: Timeline, now: float) -> Timeline:
        """The *timeline* of a new task as the task faults that strike it change it."""
        for fault in self._striking(TaskFault, (), submission.prompt, now):
            timeline = fault.adjust(timeline)
        return timeline

    def forgeries(self, task_id: str, prompt: str, now: float) -> list[CallbackForged]:
        """The forged callbacks about a task that has just been accepted."""
        return self._striking(CallbackForged, (task_id,), prompt, now)

    def of_callback(self, task_id: str, prompt: str, now: float) -> list[CallbackFault]:
        """The faults that strike the callback of a task that has just ended."""
        return self._striking(CallbackFault, (task_id,), prompt, now, besides=CallbackForged)

    def _striking(
        self, kind: type[AnyFault], task_ids: tuple[str, ...], prompt: str, now: float,
        besides: type[Fault] | tuple[()] = (),
    ) -> list[AnyFault]:  # fmt: skip
        return [
            armed.fault
            for armed in self._armed
            if isinstance(armed.fault, kind)
            and not isinstance(armed.fault, besides)
            and armed.fault.fits(task_ids, (prompt,))
            and armed.strikes(now)
        ]


def _check_is_fault(value: object) -> None:
    if isinstance(value, type) and issubclass(value, Fault):
        raise TypeError(f"{value.__name__} is a class, not a fault; write {value.__name__}()")
    if not isinstance(value, Fault):
        raise TypeError(f"{value!r} is no fault; see evolink_async.emulator.faults")
