"""Faults of requests: refusals, delays, lost connections, limits, outages."""

from __future__ import annotations

import asyncio
import math

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
    number,
    one_of,
    or_none,
    whole,
)
from evolink_async.emulator.faults._fault import REAL_SECONDS, Armed, Fault, listed
from evolink_async.emulator.faults._wire import begin, body_of, reset, write

__all__ = ["Latency", "Outage", "RateLimit", "RequestFault", "Reset", "Status"]

_STATUS = whole(200, 599)
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


@listed
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


@listed
@frozen
class Latency(RequestFault):
    """Answers late. ``Latency(0.02, "after", route="submit")``.

    Args:
        seconds: Of real time.
        when: ``before`` or ``after`` the request is processed.
    """

    seconds: float = field(default=0.05, validator=REAL_SECONDS)
    when: str = field(default="before", validator=one_of("before", "after"))

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        if self.when == "before":
            await asyncio.sleep(self.seconds)
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "after":
            await asyncio.sleep(self.seconds)
        return response


@listed
@frozen
class Reset(RequestFault):
    """Resets the connection. ``Reset("after", route="submit")``.

    Args:
        when: ``before`` the request is processed, ``during`` the answer (half of the body
            is sent), or ``after`` it is processed (nothing of the answer is sent).
    """

    when: str = field(default="before", validator=one_of("before", "during", "after"))

    async def before(self, exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        return reset(exchange) if self.when == "before" else None

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "during":
            body = body_of(response)
            stream = await begin(exchange, response, len(body))
            await write(exchange, stream, body[: len(body) // 2])
            # The half must reach the socket before the reset throws away what is unsent.
            await asyncio.sleep(0.01)
        return reset(exchange)


@listed
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
        error = ApiError(
            429, "too many requests", retry_after=float(wait) if self.retry_after else None
        )
        return exchange.refuse(error)


@listed
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
            return reset(exchange)
        page = "<html><body>The service is not available.</body></html>"
        return web.Response(text=page, status=self.status, content_type="text/html")
