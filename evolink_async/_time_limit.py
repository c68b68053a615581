"""One time-out for many exchanges, by a single timer."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

__all__ = ["TimeLimit"]


class TimeLimit:
    """What `asyncio.timeout` is to one asyncio task, to all that enter: each has so many seconds.

    A timer for each of thousands of requests, nearly always cancelled, is work that one can
    measure (``benchmarks/client_cost.py``). All have the same time here, so that the first to
    enter is the first to be late, and one timer is enough.

    Raises:
        TimeoutError: At the end of a block that took longer.
    """

    def __init__(self, seconds: float) -> None:
        """So many *seconds* of the event loop's time for each."""
        self._seconds = seconds
        # When each task is late, first the first; how often it was cancelled before it entered.
        self._inside: dict[asyncio.Task[object], tuple[float, int]] = {}
        self._late: dict[asyncio.Task[object], int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        """Begin; a task can be inside once at a time."""
        task = _current()
        loop = task.get_loop()
        self._inside[task] = (loop.time() + self._seconds, task.cancelling())
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._ring)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task = _current()
        if self._inside.pop(task, None) is not None:
            return
        before = self._late.pop(task)
        # Cancelled by others as well, it stays cancelled.
        if task.uncancel() <= before and isinstance(exc, asyncio.CancelledError):
            raise TimeoutError from exc

    def stop(self) -> None:
        """Stop the timer; nobody may be inside any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for task, (late_at, before) in list(self._inside.items()):
            if late_at > now:
                self._timer = loop.call_at(late_at, self._ring)
                return
            del self._inside[task]
            self._late[task] = before
            task.cancel()


def _current() -> asyncio.Task[object]:
    task = asyncio.current_task()
    if task is None:  # pragma: no cover - nor would aiohttp work there
        raise RuntimeError("not inside an asyncio task")
    return task
