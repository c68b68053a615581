"""What a session has done so far, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import field, frozen

__all__ = ["Stats"]


def _read_only(values: Mapping[str, float]) -> Mapping[str, float]:
    return MappingProxyType(dict(values))


@frozen(kw_only=True)
class Stats:
    """What a session is doing and has done so far.

    Attributes:
        running: Tasks watched now.
        waiting: Submits waiting for a slot.
        submits: POSTs of generations sent, resends included.
        reads: Requests that read something.
        ids_read: Tasks those reads asked for.
        retries: Submits and single calls tried again.
        cool_downs: Times the API asked the session to wait.
        cooling_down: Seconds until it may ask again, 0 if it may now.
        typical: Learned median duration of a generation in seconds, by endpoint and model,
            e.g. ``"/v1/images/generations wan2.5-text-to-image"``.
    """

    running: int = 0
    waiting: int = 0
    submits: int = 0
    reads: int = 0
    ids_read: int = 0
    retries: int = 0
    cool_downs: int = 0
    cooling_down: float = 0.0
    typical: Mapping[str, float] = field(factory=dict, converter=_read_only, hash=False)
