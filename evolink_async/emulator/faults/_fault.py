"""What all faults have in common: where and when they strike."""

from __future__ import annotations

import inspect
import random
from collections import deque
from typing import Any, NoReturn, Self

from attrs import define, field, frozen

from evolink_async.emulator._books import ROUTES
from evolink_async.emulator._rules import (
    LONGEST,
    NAME,
    SECONDS,
    Rule,
    number,
    one_of,
    or_none,
    several,
    whole,
)

__all__ = ["BASES", "ROUTE", "SHARE", "Armed", "Fault", "as_tuple"]

SHARE = number(0, 1)
ROUTE = or_none(Rule(f"one or several of {', '.join(ROUTES)}", several(one_of(*ROUTES)).allows))
_COUNT = whole(1, 10**9)
_BETWEEN = Rule(
    f"two numbers of seconds, from 0 to {LONGEST:g}, the second above the first",
    lambda value: several(SECONDS).allows(value) and len(value) == 2 and bool(value[0] < value[1]),
)
BASES = ("CallbackFault", "Fault", "RequestFault", "TaskFault")
"""Names of the classes that are only what faults have in common."""


def as_tuple(value: Any) -> Any:
    """One value or several, as a tuple; None stays None."""
    if value is None or isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, (list, range, set, frozenset)) else (value,)


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@frozen
class Fault:
    """Where and when something goes wrong; see the module for the keywords.

    Raises:
        ValueError: A value that is not allowed, or selectors that can never fit.
        TypeError: A keyword the fault does not have, or a fault that is only a base of others.
    """

    route: tuple[str, ...] | None = field(
        default=None, kw_only=True, converter=as_tuple, validator=ROUTE
    )
    task: str | None = field(default=None, kw_only=True, validator=or_none(NAME))
    prompt: str | None = field(default=None, kw_only=True, validator=or_none(NAME))
    nth: tuple[int, ...] | None = field(
        default=None,
        kw_only=True,
        converter=as_tuple,
        validator=or_none(Rule(f"{_COUNT.words}, or several", several(_COUNT).allows)),
    )
    times: int | None = field(default=None, kw_only=True, validator=or_none(_COUNT))
    rate: float = field(default=1.0, kw_only=True, validator=SHARE)
    between: tuple[float, float] | None = field(
        default=None, kw_only=True, converter=_list_as_tuple, validator=or_none(_BETWEEN)
    )

    def __new__(cls, *values: Any, **_: Any) -> Self:
        """Refuse a function or a class: a pytest mark without parentheses passes one."""
        if values and (inspect.isroutine(values[0]) or inspect.isclass(values[0])):
            name = cls.__name__
            raise TypeError(
                f"{name} was given {values[0].__name__}, which is no value: "
                f"write {name}(), with parentheses, as in @pytest.mark.evolink({name}())"
            )
        return super().__new__(cls)

    def __attrs_post_init__(self) -> None:
        name = type(self).__name__
        if name in BASES:
            derived = sorted({kind.__name__ for kind in type(self).__subclasses__()})
            raise TypeError(f"{name} is only what these have in common: {', '.join(derived)}")
        self.check_together()

    def check_together(self) -> None:
        """Refuse values that are allowed one by one, but not together.

        Raises:
            ValueError: There are such.
        """

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {name} cannot be {getattr(self, name)!r}: {why}")

    @property
    def window(self) -> tuple[float, float] | None:
        """When it may strike, in seconds since the start of the emulator; None for always."""
        return self.between

    def lets_pass(self, _armed: Armed, _now: float) -> bool:
        """Whether it leaves this occasion alone, although all selectors fit."""
        return False

    def fits(self, task_ids: tuple[str, ...], prompts: tuple[str, ...]) -> bool:
        """Whether ``task`` and ``prompt`` allow an occasion with these ids and prompts."""
        return (self.task is None or self.task in task_ids) and (
            self.prompt is None or any(self.prompt in prompt for prompt in prompts)
        )


@define(eq=False)
class Armed:
    """A fault in place and its counters.

    Attributes:
        fault: The fault.
        draw: The chance that ``rate`` is decided by.
        started_at: When the emulator started, on its clock.
        seen: Occasions so far that fit, apart from ``nth``, ``times`` and ``rate``.
        struck: Occasions it struck.
        recent: When requests passed a `RateLimit`.
    """

    fault: Fault
    draw: random.Random
    started_at: float
    seen: int = 0
    struck: int = 0
    recent: deque[float] = field(factory=deque)

    def strikes(self, now: float) -> bool:
        """Count one more occasion that fits, and say whether the fault strikes it."""
        fault = self.fault
        if fault.window is not None:
            first, last = fault.window
            if not first <= now - self.started_at < last:
                return False
        self.seen += 1
        if fault.nth is not None and self.seen not in fault.nth:
            return False
        if fault.times is not None and self.struck >= fault.times:
            return False
        if fault.rate < 1 and self.draw.random() >= fault.rate:
            return False
        if fault.lets_pass(self, now):
            return False
        self.struck += 1
        return True
