"""Many generations at once, lazily: `Session.map`."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Iterable,
    Mapping,
)
from typing import Any, Final, Protocol

from attrs import field, frozen

from evolink_async._model.requests import as_request
from evolink_async._model.snapshots import GenerationResult
from evolink_async._task import Task
from evolink_async._text import lines_of
from evolink_async.errors import (
    ConfigurationError,
    EvolinkError,
    SessionClosedError,
)

__all__ = ["Outcome", "map_requests"]

logger = logging.getLogger(__name__)

_END: Final = object()
"""Comes after the last item."""


@frozen
class Outcome:
    """What became of one item of `Session.map`: a result or an error.

    Attributes:
        index: The item's position in the input, from 0.
        request: The request made of it; the item itself if it made none.
        task: Its task; None if it was not submitted, or that is unknown.
        result: The result; None if there is an error.
        error: The error; None if there is a result.
    """

    index: int
    request: Any = field(kw_only=True)
    task: Task | None = field(default=None, kw_only=True)
    result: GenerationResult | None = field(default=None, kw_only=True)
    error: EvolinkError | None = field(default=None, kw_only=True)


class _Generator(Protocol):
    """What `map_requests` needs of a session."""

    @property
    def closed(self) -> bool: ...
    @property
    def max_in_flight(self) -> int: ...
    def check_loop(self) -> None: ...
    async def submit(self, request: Any, /) -> Task: ...


async def map_requests(session: _Generator, requests: Any) -> AsyncGenerator[Outcome, None]:
    """Implements `Session.map`."""
    session.check_loop()
    source = _pull(requests)
    pull: asyncio.Task[Any] | None = None
    items: dict[asyncio.Task[Outcome], list[Task]] = {}
    count = itertools.count()
    exhausted = False
    loop = asyncio.get_running_loop()
    try:
        while True:
            if session.closed and not items:
                raise SessionClosedError("the session was closed; map pulls no further")
            open_for_more = not (exhausted or session.closed)
            if pull is None and open_for_more and len(items) < session.max_in_flight:
                pull = loop.create_task(anext(source, _END))
            waiting: set[asyncio.Task[Any]] = {*items, pull} if pull else {*items}
            if not waiting:
                return
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if pull is not None and pull.done():
                pulled, pull = pull.result(), None
                if pulled is _END:
                    exhausted = True
                else:
                    tasks: list[Task] = []
                    index = next(count)
                    items[loop.create_task(_generate(session, index, pulled, tasks))] = tasks
            for item in [item for item in items if item.done()]:
                del items[item]
                yield item.result()
    finally:
        left = [*items, *([pull] if pull else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await source.aclose()
        for line in lines_of([task.id for tasks in items.values() for task in tasks]):
            logger.warning("map was left before the outcome of these tasks: %s", line)


async def _generate(session: _Generator, index: int, item: Any, tasks: list[Task]) -> Outcome:
    """Generate one item; its task goes into *tasks* as soon as there is one."""
    request: Any = item
    try:
        request = as_request(item)
        tasks.append(await session.submit(request))
        return Outcome(index, request=request, task=tasks[0], result=await tasks[0])
    except EvolinkError as exc:
        return Outcome(index, request=request, task=tasks[0] if tasks else None, error=exc)


async def _pull(requests: Any) -> AsyncGenerator[Any, None]:
    """The items of a sync or async iterable."""
    if isinstance(requests, AsyncIterable):
        try:
            async for item in requests:
                yield item
        finally:
            if isinstance(requests, AsyncGenerator):
                await requests.aclose()
        return
    if isinstance(requests, str | Mapping) or not isinstance(requests, Iterable):
        raise ConfigurationError(
            f"map takes an iterable of requests, not {type(requests).__name__}; "
            "for one request use generate"
        )
    for item in requests:
        yield item
