"""Rules for the fields of faults and the settings of an emulator, each with its wording."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from attrs import Attribute, frozen

__all__ = [
    "FEATURES",
    "FLAG",
    "LONGEST",
    "NAME",
    "SECONDS",
    "TEXT",
    "TOKEN",
    "UTF8",
    "Rule",
    "check_settings",
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

# Settings

FEATURES = (
    "batch",
    "credits_used",
    "duration",
    "error_details",
    "idempotency",
    "list",
    "remaining_time",
    "request_ids",
    "result_data",
    "retry_after",
)
"""Undocumented features of the API that ``without`` can switch off."""

_MOST_CREDITS = 1e12
"""What an account can have, and a result can cost."""


def _is_duration(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(map(SECONDS.allows, value)) and value[0] <= value[1]
    return callable(value) or SECONDS.allows(value)


def _is_origin(value: Any) -> bool:
    if not TOKEN.allows(value):
        return False
    try:
        parts = urlsplit(value)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    bare = parts.path in {"", "/"} and not parts.query and not parts.fragment
    return named and bare and parts.scheme in {"http", "https"} and "@" not in parts.netloc


def _is_clock(value: Any) -> bool:
    needed = (getattr(value, name, None) for name in ("now", "sleep_until"))
    return not isinstance(value, type) and all(map(callable, needed))


_RULES = {
    "host": TOKEN,
    "port": whole(0, 65535),
    "api_key": TOKEN,
    "credits": number(0, _MOST_CREDITS),
    "price": number(0, _MOST_CREDITS),
    "duration": Rule(f"{SECONDS.words}, two of them as (least, most), or a function", _is_duration),
    "estimate": or_none(SECONDS),
    "time_scale": number(0, 1e6, above=True),
    "clock": or_none(Rule("a clock such as ManualClock()", _is_clock)),
    "pictures": one_of("full", "tiny"),
    "seed": whole(-sys.maxsize, sys.maxsize),
    "models": several(NAME, least=0),
    "without": several(Rule(f"one of {', '.join(FEATURES)}", FEATURES.__contains__), least=0),
    "string_codes": FLAG,
    "faults": Rule("a tuple of faults such as (Status(503),)", lambda value: type(value) is tuple),
    "callback_origin": or_none(Rule("an origin such as http://127.0.0.1:8080", _is_origin)),
    "max_body": whole(1, 1 << 40),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a setting that breaks its rule.

    Raises:
        ValueError: Naming the setting, its value, and what is allowed.
        ImportError: ``pictures="full"`` without pillow.
    """
    for name, rule in _RULES.items():
        rule.check(name, settings[name])
    if settings["clock"] is not None and settings["time_scale"] != 1:
        raise ValueError("time_scale is for the real time: leave out clock, or give RealClock(60)")
    if settings["pictures"] == "full" and importlib.util.find_spec("PIL") is None:
        raise ImportError(
            "the emulator draws its pictures with pillow: pip install 'evolink-async[emulator]', "
            "or ask for pictures='tiny'"
        )
