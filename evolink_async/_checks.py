"""One wording for values that are not allowed, and the checks that many settings share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from evolink_async._text import shown
from evolink_async.errors import ConfigurationError, RequestValidationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import TypeIs

__all__ = ["instance", "is_number", "number", "refuse", "refuse_field", "valid", "whole"]

T = TypeVar("T")


def refuse(field: str, value: object, allowed: str, why: object = "") -> ConfigurationError:
    """The error for a setting: its name, the value, what is allowed and perhaps *why*."""
    return ConfigurationError(
        f"{_not_allowed(field, value, allowed)}{f' ({why})' if why else ''}", field=field
    )


def refuse_field(field: str, value: object, allowed: str, **advice: Any) -> RequestValidationError:
    """The error for a field of a request, with the same wording."""
    return RequestValidationError(
        _not_allowed(field, value, allowed), field=field, value=value, allowed=allowed, **advice
    )


def _not_allowed(field: str, value: object, allowed: str) -> str:
    return f"{field}={shown(value, 120)} is not allowed: {allowed}"


def is_number(value: object) -> TypeIs[float]:
    """True for a finite number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def number(
    field: str,
    value: Any,
    *,
    least: float = 0.0,
    above: bool = False,
    most: float = 1e9,
    unit: str = "a number",
) -> float:
    """*value* as a float, if it is a number from *least* (or *above* it) to *most*.

    Raises:
        ConfigurationError: It is not.
    """
    if is_number(value) and (least < value if above else least <= value) and value <= most:
        return float(value)
    raise refuse(field, value, f"{unit} {'above' if above else 'from'} {least:g} to {most:g}")


def whole(field: str, value: object, *, least: int = 1) -> int:
    """*value*, if it is a whole number.

    Raises:
        ConfigurationError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refuse(field, value, f"a whole number, {least} or more")
    return value


def instance(field: str, value: object, kind: type[T]) -> T:
    """*value*, if it is of *kind*.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(value, kind):
        raise refuse(field, value, f"{kind.__name__}(...)")
    return value


def valid(
    check: Callable[..., object], *, optional: bool = False, **bounds: Any
) -> Callable[[object, Any, object], None]:
    """*check* as a validator of attrs; None is allowed if *optional*."""

    def validate(_: object, attribute: Any, value: object) -> None:
        if not (optional and value is None):
            check(attribute.name, value, **bounds)

    return validate
