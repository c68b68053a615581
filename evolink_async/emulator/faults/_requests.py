"""Faults of requests: the answer, its body or its way to the client goes wrong."""

from __future__ import annotations

import asyncio
import math
import socket
import struct

from aiohttp import web
from attrs import field, frozen

from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._exchange import Exchange, http_date
from evolink_async.emulator._rules import (
    FLAG,
    LONGEST,
    NAME,
    SECONDS,
    TEXT,
    TOKEN,
    UTF8,
    matching,
    number,
    one_of,
    or_none,
    whole,
)
from evolink_async.emulator.faults._fault import ROUTE, Armed, Fault, as_tuple

__all__ = [
    "Endless",
    "Garbled",
    "Latency",
    "NotAPicture",
    "Outage",
    "RateLimit",
    "RequestFault",
    "Reset",
    "SlowDrip",
    "Stalled",
    "Status",
    "Truncated",
    "WrongLength",
]

_STATUS = whole(200, 599)
_REAL_SECONDS = number(0, 86400)
"""Seconds a request waits: at most a day."""
_MOST_BYTES = 1 << 30
_MEDIA_TYPE = matching(
    r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+", "a media type such as image/png"
)
_OF_TASKS = ("read", "batch", "result")
"""Routes of requests that name a task."""
_WITH_PROMPTS = ("submit", *_OF_TASKS)
"""Routes of requests whose prompt is known."""


@frozen
class RequestFault(Fault):
    """Changes or replaces the answer to a request, before or after it has been processed."""

    def check_together(self) -> None:
        self._check_has("task", _OF_TASKS)
        self._check_has("prompt", _WITH_PROMPTS)

    def _check_has(self, name: str, routes: tuple[str, ...]) -> None:
        if getattr(self, name) is not None and self.route and not set(self.route) & set(routes):
            given = ", ".join(self.route)
            self._refuse(
                name, f"of a request to {given} no {name} is known, only of {', '.join(routes)}"
            )

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        """An answer instead of processing, or None."""
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        """What to send instead of *response*, the answer to the processed request."""
        return response


@frozen
class Status(RequestFault):
    """Answers with a status of its own. ``Status(503, retry_after=2, route="submit", nth=3)``.

    Args:
        status: The HTTP status.
        message: The message of the API's JSON error.
        code: Its ``code``, instead of the one that goes with the status.
        kind: Its ``type``, instead of the one that goes with the status.
        retry_after: Seconds for the ``Retry-After`` header; None for no such header.
        as_date: Write ``Retry-After`` as an HTTP date.
        body: A body instead of the API's JSON, such as a proxy's page.
        location: A ``Location`` header, for redirects.
        processed: Answer so after the request has been processed.
        replayed: Mark the answer with ``Idempotency-Replayed: true``.
    """

    status: int = field(default=503, validator=_STATUS)
    message: str = field(default="a fault you asked for", validator=TEXT)
    code: str | None = field(default=None, kw_only=True, validator=or_none(NAME))
    kind: str | None = field(default=None, kw_only=True, validator=or_none(NAME))
    retry_after: float | None = field(default=None, kw_only=True, validator=or_none(SECONDS))
    as_date: bool = field(default=False, kw_only=True, validator=FLAG)
    body: str | None = field(default=None, kw_only=True, validator=or_none(UTF8))
    location: str | None = field(default=None, kw_only=True, validator=or_none(TOKEN))
    processed: bool = field(default=False, kw_only=True, validator=FLAG)
    replayed: bool = field(default=False, kw_only=True, validator=FLAG)

    def check_together(self) -> None:
        super().check_together()
        if self.as_date and self.retry_after is None:
            self._refuse("as_date", "there is no retry_after to write as a date")

    async def before(self, exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        return None if self.processed else self._answer(exchange)

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        return self._answer(exchange) if self.processed else response

    def _answer(self, exchange: Exchange) -> web.Response:
        if self.body is not None:
            response = web.Response(text=self.body, status=self.status, content_type="text/html")
        else:
            error = ApiError(
                self.status,
                self.message,
                code=self.code,
                kind=self.kind,
                retry_after=self.retry_after,
            )
            response = exchange.refuse(error)
        if self.retry_after is not None:
            response.headers["Retry-After"] = (
                http_date(exchange.time + self.retry_after)
                if self.as_date
                else f"{self.retry_after:.15g}"
            )
        if self.location is not None:
            response.headers["Location"] = self.location
        if self.replayed:
            response.headers["Idempotency-Replayed"] = "true"
        return response


@frozen
class Latency(RequestFault):
    """Answers late. ``Latency(0.02, "after", route="submit")``.

    Args:
        seconds: Of real time.
        when: ``before`` or ``after`` the request is processed.
    """

    seconds: float = field(default=0.05, validator=_REAL_SECONDS)
    when: str = field(default="before", validator=one_of("before", "after"))

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        if self.when == "before":
            await asyncio.sleep(self.seconds)
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "after":
            await asyncio.sleep(self.seconds)
        return response


@frozen
class Reset(RequestFault):
    """Resets the connection. ``Reset("after", route="submit")``.

    Args:
        when: ``before`` the request is processed, ``during`` the answer (half of the body
            is sent), or ``after`` it is processed (nothing of the answer is sent).
    """

    when: str = field(default="before", validator=one_of("before", "during", "after"))

    async def before(self, exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        return _reset(exchange) if self.when == "before" else None

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "during":
            body = _body_of(response)
            stream = await _begin(exchange, response, len(body))
            await _write(exchange, stream, body[: len(body) // 2])
            # The half must reach the socket before the reset throws away what is unsent.
            await asyncio.sleep(0.01)
        return _reset(exchange)


@frozen
class RateLimit(RequestFault):
    """Answers 429 beyond a rate. ``RateLimit(10, 1.0, route="submit")``.

    Args:
        requests: How many that fit pass in any *per* seconds.
        per: Emulated seconds.
        retry_after: Send the header that says when the next one passes.
    """

    requests: int = field(default=10, validator=whole(0, 10**9))
    per: float = field(default=1.0, validator=number(0, LONGEST, above=True))
    retry_after: bool = field(default=True, kw_only=True, validator=FLAG)

    def lets_pass(self, armed: Armed, now: float) -> bool:
        passed = armed.recent
        while passed and passed[0] <= now - self.per:
            passed.popleft()
        if len(passed) >= self.requests:
            return False
        passed.append(now)
        return True

    async def before(self, exchange: Exchange, armed: Armed) -> web.StreamResponse | None:
        # Whole seconds, rounded up: a client that comes back then must pass.
        wait = math.ceil(armed.recent[0] + self.per - exchange.time) if armed.recent else 1
        retry_after = float(wait) if self.retry_after else None
        return exchange.refuse(ApiError(429, "too many requests", retry_after=retry_after))


@frozen
class Outage(RequestFault):
    """Answers nothing but one status for a while. ``Outage(10, 30, status=None)``.

    Args:
        start: Emulated seconds after the start of the emulator.
        seconds: How long, in emulated seconds.
        status: 503 and the like, without the API's JSON, as a proxy does; None resets
            every connection.
    """

    start: float = field(default=0.0, validator=SECONDS)
    seconds: float = field(default=60.0, validator=number(0, LONGEST, above=True))
    status: int | None = field(default=503, validator=or_none(_STATUS))

    def check_together(self) -> None:
        super().check_together()
        if self.between is not None:
            self._refuse("between", "start and seconds say when an outage is")

    @property
    def window(self) -> tuple[float, float] | None:
        return self.start, self.start + self.seconds

    async def before(self, exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        if self.status is None:
            return _reset(exchange)
        page = "<html><body>The service is not available.</body></html>"
        return web.Response(text=page, status=self.status, content_type="text/html")


# What is wrong is the body, or how it is sent.


@frozen
class Truncated(RequestFault):
    """Ends the body early and closes the connection. ``Truncated(20, route="read")``.

    Args:
        at: Bytes sent; less than none counts from the end.
    """

    at: int = field(default=20, validator=whole(-_MOST_BYTES, _MOST_BYTES))

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body_of(response)
        return await _send(exchange, response, body[: self.at], len(body))


@frozen
class WrongLength(RequestFault):
    """Declares a length that is not the body's. ``WrongLength(-100, route="result")``.

    Args:
        by: Bytes declared too many; less than none for too few.
    """

    by: int = field(default=100, validator=whole(-_MOST_BYTES, _MOST_BYTES))

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body_of(response)
        return await _send(exchange, response, body, max(0, len(body) + self.by))


@frozen
class Garbled(RequestFault):
    """Sends a body of the same length that makes no sense. ``Garbled(route="read", times=1)``.

    Args:
        body: What to send; None for the second half overwritten.
    """

    body: str | None = field(default=None, validator=or_none(UTF8))

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body_of(response)
        half = len(body) // 2
        response.body = (
            body[:half] + b"\xff" * (len(body) - half) if self.body is None else self.body.encode()
        )
        return response


@frozen
class SlowDrip(RequestFault):
    """Sends the body in drops. ``SlowDrip(64, 0.05, route="result")``.

    Args:
        chunk: Bytes a drop.
        pause: Real seconds between two drops.
    """

    chunk: int = field(default=16, validator=whole(1, _MOST_BYTES))
    pause: float = field(default=0.05, validator=_REAL_SECONDS)

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body_of(response)
        stream = await _begin(exchange, response, len(body))
        for start in range(0, len(body), self.chunk):
            if not await _write(exchange, stream, body[start : start + self.chunk]):
                return stream
            await asyncio.sleep(self.pause)
        exchange.status = response.status
        return stream


@frozen
class Endless(RequestFault):
    """Never stops sending blanks, which JSON allows. ``Endless(route="read", nth=2)``."""

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        stream = await _begin(exchange, response, None)
        while await _write(exchange, stream, b" " * 65536):  # noqa: ASYNC110 - lets others run
            await asyncio.sleep(0)
        return stream


@frozen
class Stalled(RequestFault):
    """Sends the head and then nothing until the client leaves. ``Stalled(route="result")``."""

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        stream = await _begin(exchange, response, len(_body_of(response)))
        while not exchange.has_left:  # noqa: ASYNC110 - a transport has no event for its end
            await asyncio.sleep(0.02)
        return stream


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


def _body_of(response: web.Response) -> bytes:
    body = response.body
    return body if isinstance(body, bytes) else b""


def _reset(exchange: Exchange) -> web.StreamResponse:
    """Reset the connection (not merely close it). The response returned is never sent."""
    transport = exchange.request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        if connection is not None:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    exchange.status = None
    response = web.Response()
    response.force_close()
    return response


async def _begin(
    exchange: Exchange, response: web.Response, length: int | None
) -> web.StreamResponse:
    """Send the head of *response* with this content length; None for a body without an end."""
    stream = web.StreamResponse(status=response.status, headers=response.headers)
    stream.headers.pop("Content-Length", None)
    stream.headers["Content-Type"] = response.headers.get("Content-Type", "application/json")
    if length is not None:
        stream.content_length = length
    stream.force_close()
    await stream.prepare(exchange.request)
    return stream


async def _write(exchange: Exchange, stream: web.StreamResponse, data: bytes) -> bool:
    """Send more of the body; false once the client has gone."""
    if exchange.has_left:
        return False
    try:
        await stream.write(data)
    except ConnectionError:
        return False
    return True


async def _send(
    exchange: Exchange, response: web.Response, body: bytes, declared: int
) -> web.StreamResponse:
    """Send *body* under a wrong length, then close."""
    exchange.status = response.status
    stream = await _begin(exchange, response, declared)
    await _write(exchange, stream, body)
    transport = exchange.request.transport
    if transport is not None:
        if len(body) > declared:
            # Later, as the declared part alone makes a whole answer for the client.
            await asyncio.sleep(0.01)
            transport.write(body[declared:])
        transport.close()
    return stream
