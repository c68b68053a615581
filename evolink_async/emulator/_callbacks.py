"""Sending callbacks as the API's page describes it, or as the faults want it.

A callback is POSTed when its task has ended, with the body of a read. The receiver has 10 s to
answer; any 2xx is success. After a failure it is sent again, 1 s, 2 s and 4 s later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from evolink_async.emulator._books import Books, CallbackRecord
from evolink_async.emulator._clock import Clock, held
from evolink_async.emulator._service import Service
from evolink_async.emulator._tasks import GenerationTask
from evolink_async.emulator.faults import (
    CallbackDelayed,
    CallbackDropped,
    CallbackDuplicated,
    CallbackFault,
    CallbackForged,
    CallbackReordered,
    Faults,
)

__all__ = ["Callbacks"]

_TIMEOUT = aiohttp.ClientTimeout(total=10)
_RETRY_DELAYS = (1.0, 2.0, 4.0)


class Callbacks:
    """Sends the callbacks of one emulator; to be made in its event loop.

    Args:
        origin: Where all of them go, whatever host they name.
    """

    def __init__(
        self, origin: str, clock: Clock, service: Service, faults: Faults, books: Books
    ) -> None:
        self._origin = origin.rstrip("/")
        self._clock = clock
        self._service = service
        self._faults = faults
        self._books = books
        self._loop = asyncio.get_running_loop()
        self._http = aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=False)
        self._sending: set[asyncio.Task[None]] = set()
        self._timeline_changed: dict[str, asyncio.Event] = {}
        self._sent = asyncio.Event()

    def expect(self, task: GenerationTask) -> None:
        """Send the callback of *task* when it ends."""
        timeline_changed = self._timeline_changed[task.id] = asyncio.Event()
        sending = self._loop.create_task(self._follow(task, timeline_changed))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    def timeline_changed(self, task_id: str) -> None:
        """Find out anew when this task ends; may be called from any thread."""
        event = self._timeline_changed.get(task_id)
        if event is not None:
            self._loop.call_soon_threadsafe(event.set)

    async def aclose(self) -> None:
        """Send no more."""
        for sending in self._sending:
            sending.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await self._http.close()

    async def _follow(self, task: GenerationTask, timeline_changed: asyncio.Event) -> None:
        url = self._local(task.submission.callback_url or "")
        about = task.id, task.submission.prompt
        for fault in self._faults.forgeries(*about, self._clock.now()):
            await self._post(task, url, self._forgery(task, fault), attempt=1, forged=True)
        await self._end_of(task, timeline_changed)
        del self._timeline_changed[task.id]
        struck = self._faults.of_callback(*about, self._clock.now())
        if any(isinstance(fault, CallbackDropped) for fault in struck):
            return
        copies = await self._hold_back(struck)
        for _ in range(copies):
            await self._deliver(task, url)

    async def _end_of(self, task: GenerationTask, timeline_changed: asyncio.Event) -> None:
        while self._clock.now() < task.timeline.ends_at:
            timeline_changed.clear()
            await _first(timeline_changed.wait(), self._clock.sleep_until(task.timeline.ends_at))

    async def _hold_back(self, struck: list[CallbackFault]) -> int:
        """Wait as long as the faults say; returns how many times to send."""
        copies = 1
        for fault in struck:
            if isinstance(fault, CallbackDelayed):
                await self._clock.sleep_until(self._clock.now() + fault.seconds)
            elif isinstance(fault, CallbackReordered):
                waited_enough = self._clock.sleep_until(self._clock.now() + fault.seconds)
                await _first(self._sent.wait(), waited_enough)
            elif isinstance(fault, CallbackDuplicated):
                copies = fault.copies
        return copies

    async def _deliver(self, task: GenerationTask, url: str) -> None:
        """Up to four attempts."""
        self._service.settle()
        for attempt, wait in enumerate((*_RETRY_DELAYS, None), start=1):
            answer = self._service.body_of(task, self._clock.now())
            if await self._post(task, url, answer, attempt=attempt, forged=False):
                break
            if wait is not None:
                await self._clock.sleep_until(self._clock.now() + wait)
        # Callbacks that wait for another one to be sent first are sent now.
        self._sent.set()
        self._sent = asyncio.Event()

    async def _post(
        self, task: GenerationTask, url: str, body: Any, *, attempt: int, forged: bool
    ) -> bool:
        time = self._clock.now()
        status = None
        with held(self._clock):
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with self._http.post(url, json=body, allow_redirects=False) as response:
                    status = response.status
            self._books.record_callback(
                CallbackRecord(
                    time=time,
                    task_id=task.id,
                    url=url,
                    status=status,
                    attempt=attempt,
                    forged=forged,
                )
            )
        return status is not None and 200 <= status < 300

    def _forgery(self, task: GenerationTask, fault: CallbackForged) -> dict[str, Any]:
        answer = self._service.body_of(task, self._clock.now())
        return {**answer, "status": fault.status, "progress": 100, "results": [fault.url]}

    def _local(self, url: str) -> str:
        parts = urlsplit(url)
        query = f"?{parts.query}" if parts.query else ""
        return f"{self._origin}{parts.path or '/'}{query}"


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first of several to end, and cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
