"""Faults of callbacks."""

from __future__ import annotations

from attrs import field, frozen

from evolink_async.emulator._rules import NAME, SECONDS, TEXT, whole
from evolink_async.emulator.faults._fault import Fault, listed

__all__ = [
    "CallbackDelayed",
    "CallbackDropped",
    "CallbackDuplicated",
    "CallbackFault",
    "CallbackForged",
    "CallbackReordered",
]


@frozen
class CallbackFault(Fault):
    """Changes how the callback of a task is sent, decided when it is due."""

    def check_together(self) -> None:
        if self.route is not None:
            self._refuse("route", "a callback goes to no route; use prompt, task or nth")


@listed
@frozen
class CallbackDropped(CallbackFault):
    """The callback is never sent. ``CallbackDropped(rate=0.5)``."""


@listed
@frozen
class CallbackDelayed(CallbackFault):
    """The callback comes late. ``CallbackDelayed(120.0, prompt="lake")``.

    Args:
        seconds: How late, in emulated seconds.
    """

    seconds: float = field(default=30.0, validator=SECONDS)


@listed
@frozen
class CallbackDuplicated(CallbackFault):
    """The callback comes again and again. ``CallbackDuplicated(3)``.

    Args:
        copies: How many times it is sent in all.
    """

    copies: int = field(default=2, validator=whole(2, 1000))


@listed
@frozen
class CallbackReordered(CallbackFault):
    """The callback is sent after the next task's. ``CallbackReordered(nth=1)``.

    If no other follows within *seconds* of emulated time, it is sent then.

    Args:
        seconds: How long it waits for another.
    """

    seconds: float = field(default=60.0, validator=SECONDS)


@listed
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
