"""The rules for the settings of an emulator."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from evolink_async.emulator._rules import (
    FLAG,
    NAME,
    SECONDS,
    TOKEN,
    Rule,
    number,
    one_of,
    or_none,
    several,
    whole,
)

__all__ = ["FEATURES", "check"]

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


def check(settings: Mapping[str, Any]) -> None:
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
