"""The EvoLink API on loopback, to run and test programs against: no key, no money, no network.

::

    async with Emulator(clock=ManualClock(), pictures="tiny") as emulator:
        ...                                   # emulator.base_url, .api_key, .clock
        assert emulator.books.submits(prompt="A peaceful lake")

It is an independent implementation of the API's pages and shares no code with the client.
"""

from __future__ import annotations

from evolink_async.emulator import faults
from evolink_async.emulator._books import Books, CallbackRecord, RequestRecord, TaskRecord
from evolink_async.emulator._clock import Clock, ManualClock, RealClock
from evolink_async.emulator._rules import FEATURES
from evolink_async.emulator._server import Emulator, serve

__all__ = [
    "FEATURES",
    "Books",
    "CallbackRecord",
    "Clock",
    "Emulator",
    "ManualClock",
    "RealClock",
    "RequestRecord",
    "TaskRecord",
    "faults",
    "serve",
]
