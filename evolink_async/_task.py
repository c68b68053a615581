"""`Task`: an awaitable handle on one watched generation."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, Final, Protocol

from evolink_async._checks import number
from evolink_async._clock import Clock, sleep
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import RESUBMITTABLE, GenerationResult, TaskSnapshot
from evolink_async._polling.watch import Watch, differs
from evolink_async._polling.watcher import Watcher
from evolink_async._text import printable
from evolink_async.errors import (
    EvolinkError,
    TaskCancelledError,
    TaskError,
    TaskFailedError,
    TaskTimeoutError,
)

__all__ = ["Task"]

_LONGEST_WAIT: Final = 1e9


class _Session(Protocol):
    """What a task needs of its session."""

    @property
    def clock(self) -> Clock: ...
    def _attach(self, task_id: str) -> Watch: ...
    def _watcher_here(self) -> Watcher: ...
    async def download(
        self, result: GenerationResult, folder: str | os.PathLike[str], /, *, overwrite: bool
    ) -> tuple[Path, ...]: ...


class Task:
    """A generation on the server, awaitable from anywhere and as often as you like.

    Example:
        ``result = await task``

    `asyncio.gather`, `wait_for`, `timeout`, `shield` and `as_completed` take it as it is;
    where asyncio insists on a coroutine (`asyncio.create_task`, `asyncio.wait`), pass
    ``task.wait()``. Cancelling an awaiter stops that awaiter only: the session goes on
    watching. There is no ``cancel``, because the API offers none.
    """

    __slots__ = ("__weakref__", "_id", "_session", "_watch")

    def __init__(self, task_id: str, session: _Session, watch: Watch | None = None) -> None:
        """Made by a session: see `Session.submit` and `Session.task`."""
        self._id = task_id
        self._session = session
        self._watch = watch

    def __repr__(self) -> str:
        progress = "" if self.progress is None else f" {self.progress} %"
        reason = None if self._watch is None else self._watch.reason
        given_up = "" if reason is None else f", given up: {type(reason).__name__}"
        return f"<Task {self._id} {self._shown_status}{progress}{given_up}>"

    @property
    def id(self) -> str:
        """The task's id: all that is needed to find it again with `Session.task`."""
        return self._id

    @property
    def snapshot(self) -> TaskSnapshot | None:
        """The task as last read; None for a handle made from an id and not read yet."""
        return self._watch.snapshot if self._watch is not None else None

    @property
    def status(self) -> str | None:
        """The API's word for its state as last read; None if not read yet."""
        return self.snapshot.status if self.snapshot is not None else None

    @property
    def _shown_status(self) -> str:
        return "not read yet" if self.status is None else printable(self.status, 60)

    @property
    def progress(self) -> int | None:
        """0 to 100 as last read; None if unknown."""
        return self.snapshot.progress if self.snapshot is not None else None

    @property
    def request(self) -> ImageRequest | RawRequest | None:
        """What was submitted; None for a handle made from an id."""
        return self._watch.request if self._watch is not None else None

    @property
    def idempotency_key(self) -> str | None:
        """The key it was submitted with; None for a handle made from an id."""
        return self._watch.idempotency_key if self._watch is not None else None

    def done(self) -> bool:
        """True once awaiting it returns or raises at once."""
        return self._watch is not None and self._watch.ended

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        return self.wait().__await__()

    async def wait(self, *, timeout: float | None = None) -> GenerationResult:  # noqa: ASYNC109 - this caller's only, on the session's clock
        """The result, once there is one.

        Args:
            timeout: Seconds this caller is willing to wait; the watch goes on.

        Raises:
            TaskFailedError: The generation failed.
            TaskCancelledError: It was cancelled on the server.
            TaskTimeoutError: *timeout* or the session's deadline passed first.
            SessionClosedError: The session was closed first.
            EvolinkError: The API refuses to show the task, e.g. `NotFoundError`.
        """
        watch = self._watched()
        if timeout is None:
            await self._session._watcher_here().until_ended(watch)
        elif not await self._ended_within(watch, timeout):
            raise TaskTimeoutError(
                f"task {self._id} is {self._shown_status} after waiting {timeout:g} s; "
                f"it goes on, wait again or see session.task({self._id!r})",
                task_id=self._id,
                snapshot=self.snapshot,
            )
        return _outcome(watch)

    async def _ended_within(self, watch: Watch, timeout: float) -> bool:  # noqa: ASYNC109 - see wait
        number("timeout", timeout, most=_LONGEST_WAIT, unit="None, or seconds")
        loop = asyncio.get_running_loop()
        racers = {
            loop.create_task(self._session._watcher_here().until_ended(watch)),
            loop.create_task(sleep(self._session.clock, timeout)),
        }
        try:
            await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for racer in racers:
                racer.cancel()
            await asyncio.gather(*racers, return_exceptions=True)
        return watch.ended

    async def updates(self) -> AsyncGenerator[TaskSnapshot, None]:
        """Each change of status or progress, starting with what is known, ending with the end.

        A slow consumer sees the newest state, not every one in between. A failed or
        cancelled task is yielded like any other; awaiting the task raises.

        Raises:
            TaskTimeoutError: The session's deadline passed.
            SessionClosedError: The session was closed.
            EvolinkError: The API refuses to show the task.
        """
        watch = self._watched()
        seen: TaskSnapshot | None = None
        while True:
            snapshot = watch.snapshot
            if snapshot is not None and differs(seen, snapshot):
                seen = snapshot
                yield snapshot
            elif watch.ended:
                break
            else:
                await self._session._watcher_here().until_changed(watch)
        _raise_again(watch.reason)

    async def refresh(self) -> TaskSnapshot:
        """Poll now, and return the answer. Nothing is sent for a task that has ended.

        A task given up after its deadline is watched again.

        Raises:
            EvolinkError: The read failed.
        """
        if self._watch is not None and self._watch.reason is not None:
            self._watch = None
        watch = self._watched()
        await self._session._watcher_here().poll(watch)
        _raise_again(watch.reason or watch.last_error)
        if watch.snapshot is None:  # pragma: no cover - an answer is a snapshot or an error
            raise AssertionError(self._id)
        return watch.snapshot

    async def download(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False
    ) -> tuple[Path, ...]:
        """Wait for the result and save it; see `Session.download`."""
        return await self._session.download(await self, folder, overwrite=overwrite)

    def _watched(self) -> Watch:
        if self._watch is None:
            self._watch = self._session._attach(self._id)
        return self._watch


def _raise_again(error: EvolinkError | None) -> None:
    """Raise a copy of *error*, if there is one: several awaiters share no object."""
    if error is not None:
        raise copy.copy(error) from error.__cause__


def _outcome(watch: Watch) -> GenerationResult:
    """The result of an ended watch, or its error."""
    _raise_again(watch.reason)
    snapshot = watch.snapshot
    if snapshot is None:  # pragma: no cover - a watch ends with a snapshot or a reason
        raise AssertionError(watch.id)
    if snapshot.status == "failed":
        raise _failure(snapshot)
    if snapshot.status == "cancelled":
        raise TaskCancelledError(
            f"task {snapshot.id} was cancelled on the server; submit it again if you still want it",
            task_id=snapshot.id,
            snapshot=snapshot,
        )
    return GenerationResult.from_snapshot(snapshot)


_ADVICE = {
    "content_policy_violation": "change the prompt",
    "invalid_parameters": "change the request",
    "image_processing_error": "change the input image",
    "image_dimension_mismatch": "change the input image or the size",
    "resource_not_found": "check the id or the input link, it may have expired",
    "generation_failed_no_content": "another prompt may work",
    "quota_exceeded": "slow down or top up, then submit it again",
}


def _failure(snapshot: TaskSnapshot) -> TaskError:
    code = printable(snapshot.error_code or "unknown_error", 80)
    reason = printable(snapshot.error_message or "", 300)
    retryable = code in RESUBMITTABLE
    advice = _ADVICE.get(code, "submitting it again later may work" if retryable else "")
    message = f"task {snapshot.id} failed ({code})" + (f": {reason}" if reason else "")
    return TaskFailedError(
        message + (f"; {advice}" if advice else ""),
        task_id=snapshot.id,
        snapshot=snapshot,
        code=code,
        reason=reason,
        retryable=retryable,
    )
