"""What can go wrong in an emulator: one class for each thing a client may meet.

Every fault says where and when it strikes, in keywords they all share::

    emulator.faults.add(Status(503, retry_after=2, route="submit", nth=3))
    emulator.faults.add(TaskFails("content_policy_violation", prompt="forbidden"))
    emulator.faults.add(Reset("after", route="submit", rate=0.2))

* ``route``: one of `ROUTES`, or several; None for any. For request faults.
* ``task``: a task id. Request faults strike the requests that name it: reads, batch reads,
  results. A task fault changes that running task as soon as it is added. A callback fault
  strikes the callback of that task.
* ``prompt``: only submits and tasks whose prompt contains this text. (The books look for the
  whole prompt.)
* ``nth``: only the n-th occasion that fits all of the above, counted from 1; or several.
* ``times``: strike at most so many times.
* ``rate``: strike this share of what fits, drawn with the emulator's seed.
* ``between``: only from the one to the other, in emulated seconds since the start.

A task's id is known once its submit is answered. A fault that strikes before then, or at a
submit, is chosen by ``prompt`` or ``nth``. Selectors that can never fit, and values that are not
allowed, are refused with a `ValueError` where the fault is made.

*Request faults* change an answer, *task faults* the timeline of a task, decided at its submit,
*callback faults* the callbacks. Waiting inside a request is real time, as a client's
HTTP time-outs are; everything else is the emulator's time.
"""

from __future__ import annotations

from evolink_async.emulator._books import ROUTES
from evolink_async.emulator.faults._fault import BASES, Armed, Fault
from evolink_async.emulator.faults._registry import Faults
from evolink_async.emulator.faults._requests import (
    Endless,
    Garbled,
    Latency,
    NotAPicture,
    Outage,
    RateLimit,
    RequestFault,
    Reset,
    SlowDrip,
    Stalled,
    Status,
    Truncated,
    WrongLength,
)
from evolink_async.emulator.faults._tasks import (
    CallbackDelayed,
    CallbackDropped,
    CallbackDuplicated,
    CallbackFault,
    CallbackForged,
    CallbackReordered,
    FewerResults,
    ProgressFallsBack,
    TaskCancelled,
    TaskFails,
    TaskFault,
    TaskHangs,
    TaskLags,
    TaskVanishes,
    UnknownStatus,
)

__all__ = [
    "ROUTES",
    "Armed",
    "CallbackDelayed",
    "CallbackDropped",
    "CallbackDuplicated",
    "CallbackFault",
    "CallbackForged",
    "CallbackReordered",
    "Endless",
    "Fault",
    "Faults",
    "FewerResults",
    "Garbled",
    "Latency",
    "NotAPicture",
    "Outage",
    "ProgressFallsBack",
    "RateLimit",
    "RequestFault",
    "Reset",
    "SlowDrip",
    "Stalled",
    "Status",
    "TaskCancelled",
    "TaskFails",
    "TaskFault",
    "TaskHangs",
    "TaskLags",
    "TaskVanishes",
    "Truncated",
    "UnknownStatus",
    "WrongLength",
    "kinds",
]


def kinds() -> dict[str, type[Fault]]:
    """The faults there are, by name."""
    return {
        name: kind
        for name, kind in sorted(globals().items())
        if isinstance(kind, type) and issubclass(kind, Fault) and name not in BASES
    }
