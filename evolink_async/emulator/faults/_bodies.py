"""Faults of answers that have been processed: what is wrong is the body, or how it is sent."""

from __future__ import annotations

import asyncio

from aiohttp import web
from attrs import field, frozen

from evolink_async.emulator._exchange import Exchange
from evolink_async.emulator._rules import UTF8, matching, or_none, whole
from evolink_async.emulator.faults._fault import REAL_SECONDS, ROUTE, as_tuple, listed
from evolink_async.emulator.faults._requests import RequestFault
from evolink_async.emulator.faults._wire import begin, body_of, has_left, send, write

__all__ = ["Endless", "Garbled", "NotAPicture", "SlowDrip", "Stalled", "Truncated", "WrongLength"]

_MOST_BYTES = 1 << 30
_MEDIA_TYPE = matching(
    r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+", "a media type such as image/png"
)


@listed
@frozen
class Truncated(RequestFault):
    """Ends the body early and closes the connection. ``Truncated(20, route="read")``.

    Args:
        at: Bytes sent; less than none counts from the end.
    """

    at: int = field(default=20, validator=whole(-_MOST_BYTES, _MOST_BYTES))

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = body_of(response)
        exchange.status = response.status
        return await send(exchange, response, body[: self.at], len(body))


@listed
@frozen
class WrongLength(RequestFault):
    """Declares a length that is not the body's. ``WrongLength(-100, route="result")``.

    Args:
        by: Bytes declared too many; less than none for too few.
    """

    by: int = field(default=100, validator=whole(-_MOST_BYTES, _MOST_BYTES))

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = body_of(response)
        exchange.status = response.status
        return await send(exchange, response, body, max(0, len(body) + self.by))


@listed
@frozen
class Garbled(RequestFault):
    """Sends a body of the same length that makes no sense. ``Garbled(route="read", times=1)``.

    Args:
        body: What to send; None for the second half overwritten.
    """

    body: str | None = field(default=None, validator=or_none(UTF8))

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = body_of(response)
        half = len(body) // 2
        response.body = (
            body[:half] + b"\xff" * (len(body) - half) if self.body is None else self.body.encode()
        )
        return response


@listed
@frozen
class SlowDrip(RequestFault):
    """Sends the body in drops. ``SlowDrip(64, 0.05, route="result")``.

    Args:
        chunk: Bytes a drop.
        pause: Real seconds between two drops.
    """

    chunk: int = field(default=16, validator=whole(1, _MOST_BYTES))
    pause: float = field(default=0.05, validator=REAL_SECONDS)

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = body_of(response)
        stream = await begin(exchange, response, len(body))
        for start in range(0, len(body), self.chunk):
            if not await write(exchange, stream, body[start : start + self.chunk]):
                return stream
            await asyncio.sleep(self.pause)
        exchange.status = response.status
        return stream


@listed
@frozen
class Endless(RequestFault):
    """Never stops sending blanks, which JSON allows. ``Endless(route="read", nth=2)``."""

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        stream = await begin(exchange, response, None)
        while await write(exchange, stream, b" " * 65536):  # noqa: ASYNC110 - lets others run
            await asyncio.sleep(0)
        return stream


@listed
@frozen
class Stalled(RequestFault):
    """Sends the head and then nothing until the client leaves. ``Stalled(route="result")``."""

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        stream = await begin(exchange, response, len(body_of(response)))
        while not has_left(exchange):  # noqa: ASYNC110 - a transport has no event for its end
            await asyncio.sleep(0.02)
        return stream


@listed
@frozen
class NotAPicture(RequestFault):
    """Serves a page where a picture should be. ``NotAPicture(task=task.id)``.

    Args:
        content_type: What the answer says it is.
    """

    route: tuple[str, ...] | None = field(
        default=("result",), kw_only=True, converter=as_tuple, validator=ROUTE
    )
    content_type: str = field(default="image/png", validator=_MEDIA_TYPE)

    async def after(self, exchange: Exchange, _response: web.Response) -> web.StreamResponse:
        exchange.status = 200
        return web.Response(body=b"<html>no picture</html>", content_type=self.content_type)
