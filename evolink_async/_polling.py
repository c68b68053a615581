"""When to look next. Pure arithmetic: time is passed in."""

from __future__ import annotations

import math

from attrs import field, frozen

from evolink_async.errors import ConfigurationError

__all__ = ["PollPolicy"]


def _seconds(_: object, attribute: object, value: object) -> None:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]  # number says so
        name = getattr(attribute, "name", "value")
        raise ConfigurationError(f"{name}={value!r} is not allowed: seconds, a number above 0")


@frozen(kw_only=True)
class PollPolicy:
    """When a running task is looked at again.

    Attributes:
        min_interval: Fewest seconds between two looks at one task.
        max_interval: Most seconds between two looks.
        deadline: Seconds after which a task is given up with `TaskTimeoutError`; None
            for never. The generation itself goes on.
    """

    min_interval: float = field(default=0.25, validator=_seconds)
    max_interval: float = field(default=60.0, validator=_seconds)
    deadline: float | None = field(default=3600.0)

    @deadline.validator
    def _check_deadline(self, attribute: object, value: object) -> None:
        if value is not None:
            _seconds(self, attribute, value)

    def next_age(self, age: float, estimate: float | None) -> float:
        """The age in seconds at which to look next, after a look at *age* (0: none yet)."""
        usable = estimate is not None and 0 < estimate < 1e6
        first = 0.8 * estimate if usable else 3.0  # type: ignore[operator]  # usable says so
        interval = 0.5 * math.sqrt(age) if age > 0 else first
        return age + min(self.max_interval, max(self.min_interval, interval))
