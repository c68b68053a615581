"""Rules for the fields of faults and the settings of an emulator, each with its wording."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from attrs import Attribute, frozen

__all__ = [
    "FLAG",
    "LONGEST",
    "NAME",
    "SECONDS",
    "TEXT",
    "TOKEN",
    "UTF8",
    "Rule",
    "matching",
    "number",
    "one_of",
    "or_none",
    "several",
    "whole",
]

LONGEST = 1e10
"""The most seconds anything may last: three centuries, within what dates can say."""


@frozen
class Rule:
    """What a value must be.

    Attributes:
        words: The rule as it follows "must be".
        allows: Whether a value of any type follows the rule.
    """

    words: str
    allows: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Refuse a *value* that breaks the rule.

        Raises:
            ValueError: With *name*, what is allowed, and the value.
        """
        if not self.allows(value):
            raise ValueError(f"{name} must be {self.words}, not {_shown(value)}")

    def __call__(self, owner: object, attribute: Attribute[Any], value: Any) -> None:
        """Check an attribute, as a validator of attrs."""
        self.check(f"{type(owner).__name__}: {attribute.name}", value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def number(least: float, most: float, *, above: bool = False) -> Rule:
    """A finite number within bounds; with *above*, more than *least*."""

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return least <= value <= most and not (above and value == least)

    words = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
    return Rule(f"a number {words}", allows)


def whole(least: int, most: int) -> Rule:
    """An integer within bounds."""

    def allows(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Rule(f"a whole number from {least} to {most}", allows)


def one_of(*words: str) -> Rule:
    """One of these texts."""
    return Rule(" or ".join(map(repr, words)), lambda value: value in words)


def matching(pattern: str, words: str) -> Rule:
    """A text that *pattern* matches as a whole."""
    compiled = re.compile(pattern)
    return Rule(
        words, lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None
    )


def or_none(rule: Rule) -> Rule:
    """What *rule* allows, or None."""
    return Rule(f"{rule.words}, or None", lambda value: value is None or rule.allows(value))


def several(rule: Rule, *, least: int = 1) -> Rule:
    """A tuple of *least* values or more, each allowed by *rule*."""

    def allows(value: Any) -> bool:
        return isinstance(value, tuple) and len(value) >= least and all(map(rule.allows, value))

    return Rule(f"a tuple, each {rule.words}", allows)


def _is_utf8(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


FLAG = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str))
NAME = Rule("a text that is not empty", lambda value: isinstance(value, str) and value != "")
TOKEN = matching(r"[!-~]+", "printable ASCII without blanks")
SECONDS = number(0, LONGEST)
UTF8 = Rule("a text that UTF-8 can encode", _is_utf8)
