"""What an emulator can be told to do wrong: one class for each thing a client may meet.

Every fault says where and when it strikes, in keywords they all share::

    emulator.faults.add(Status(503, retry_after=2, route="submit", nth=3))
    emulator.faults.add(TaskFails("content_policy_violation", prompt="forbidden"))
    emulator.faults.add(Reset("after", route="submit", rate=0.2))

* ``route``: one of `ROUTES`, or several; None for any. For request faults.
* ``task``: a task id. Request faults strike the requests that name it: reads, batch reads,
  results. A task fault changes that running task as soon as it is added, whatever else is
  going to happen. A callback fault spoils the callback of that task.
* ``prompt``: only submits and tasks whose prompt contains this, as in ``"lake" in prompt``
  (the books, by contrast, look for the whole prompt).
* ``nth``: only the n-th that fits all of the above, counted from 1; or several.
* ``times``: strike at most so many times.
* ``rate``: strike this share of what fits, drawn with the emulator's seed.
* ``between``: only from the one to the other, in emulated seconds since the start.

A task's id is known once its submit is answered. What strikes before then, or at a submit, is
chosen by ``prompt`` or ``nth``. Selectors that can never fit, and values that cannot be, are
refused with a `ValueError` where the fault is made.

*Request faults* spoil an answer, *task faults* the life of a task, decided at its submit,
*callback faults* the callbacks. Waiting inside a request is real time, as a client's
HTTP time-outs are; everything else is the emulator's time.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, Self

from aiohttp import web
from attrs import define, evolve, field, frozen

from evolink_async.emulator._books import ROUTES
from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._exchange import Exchange, http_date
from evolink_async.emulator._rules import (
    FLAG,
    LONGEST,
    NAME,
    TEXT,
    TOKEN,
    UTF8,
    Rule,
    matching,
    number,
    one_of,
    or_none,
    several,
    whole,
)

if TYPE_CHECKING:
    from evolink_async.emulator._contract import Submission
    from evolink_async.emulator._tasks import Course

    Redirect = Callable[[str, Callable[[Course, float], Course]], bool]
    """Changes the course of a task with this id, if it runs, and says whether it does."""

__all__ = [
    "ROUTES",
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

_OF_TASKS = ("read", "batch", "result")
_WITH_PROMPTS = ("submit", *_OF_TASKS)


def _several(value: Any) -> Any:
    """One or several, as a tuple."""
    if value is None or isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, (list, range, set, frozenset)) else (value,)


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_SECONDS = number(0, LONGEST)
_REAL_SECONDS = number(0, 86400)
_SHARE = number(0, 1)
_STATUS = whole(200, 599)
_BYTES = 1 << 30
_ROUTE = or_none(
    Rule(f"one or several of {', '.join(ROUTES)}", several(one_of(*ROUTES)).allows),
)
_NTH = whole(1, 10**9)
_MEDIA_TYPE = matching(
    r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+", "a media type such as image/png"
)
_BETWEEN = Rule(
    f"two numbers of seconds, from 0 to {LONGEST:g}, the second above the first",
    lambda value: several(_SECONDS).allows(value) and len(value) == 2 and bool(value[0] < value[1]),
)


@frozen
class Fault:
    """Where and when something goes wrong; see the module for the keywords.

    Raises:
        ValueError: A value that is not allowed, or selectors that can never fit.
        TypeError: A keyword the fault does not have, or a fault that is only a base of others.
    """

    route: tuple[str, ...] | None = field(
        default=None, kw_only=True, converter=_several, validator=_ROUTE
    )
    task: str | None = field(default=None, kw_only=True, validator=or_none(NAME))
    prompt: str | None = field(default=None, kw_only=True, validator=or_none(NAME))
    nth: tuple[int, ...] | None = field(
        default=None,
        kw_only=True,
        converter=_several,
        validator=or_none(Rule(f"{_NTH.words}, or several", several(_NTH).allows)),
    )
    times: int | None = field(default=None, kw_only=True, validator=or_none(_NTH))
    rate: float = field(default=1.0, kw_only=True, validator=_SHARE)
    between: tuple[float, float] | None = field(
        default=None, kw_only=True, converter=_pair, validator=or_none(_BETWEEN)
    )

    def __new__(cls, *values: Any, **_: Any) -> Self:
        """Tell whoever forgot the parentheses in a mark of pytest."""
        if values and (inspect.isroutine(values[0]) or inspect.isclass(values[0])):
            name = cls.__name__
            raise TypeError(
                f"{name} was given {values[0].__name__}, which is no value: "
                f"write {name}(), with parentheses, as in @pytest.mark.evolink({name}())"
            )
        return super().__new__(cls)

    def __attrs_post_init__(self) -> None:
        if type(self) in _BASES:
            names = ", ".join(kinds(type(self)))
            raise TypeError(f"{type(self).__name__} is only what these have in common: {names}")
        self.check_together()

    def check_together(self) -> None:
        """Refuse values that are allowed one by one, but not together.

        Raises:
            ValueError: There are such.
        """

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {name} cannot be {getattr(self, name)!r}: {why}")

    @property
    def window(self) -> tuple[float, float] | None:
        """When it may strike, in seconds since the start of the emulator; None for always."""
        return self.between

    def spares(self, _armed: Armed, _now: float) -> bool:
        """Whether it lets this occasion pass for reasons of its own."""
        return False

    def fits(self, task_ids: tuple[str, ...], prompts: tuple[str, ...]) -> bool:
        """Whether it is about one of these tasks, or one with one of these prompts."""
        return (self.task is None or self.task in task_ids) and (
            self.prompt is None or any(self.prompt in prompt for prompt in prompts)
        )


@define(eq=False)
class Armed:
    """A fault in place, and what it has seen and done."""

    fault: Fault
    draw: random.Random
    started_at: float
    seen: int = 0
    struck: int = 0
    recent: deque[float] = field(factory=deque)

    def strikes(self, now: float) -> bool:
        """Count one more occasion that fits, and say whether the fault strikes it."""
        fault = self.fault
        if fault.window is not None:
            first, last = fault.window
            if not first <= now - self.started_at < last:
                return False
        self.seen += 1
        if fault.nth is not None and self.seen not in fault.nth:
            return False
        if fault.times is not None and self.struck >= fault.times:
            return False
        if fault.rate < 1 and self.draw.random() >= fault.rate:
            return False
        if fault.spares(self, now):
            return False
        self.struck += 1
        return True


@define(eq=False)
class Faults:
    """The faults an emulator has been told to make, in the order in which they were added."""

    _seed: int
    _started_at: float
    _redirect: Redirect
    _armed: list[Armed] = field(factory=list, init=False)
    _added: int = field(default=0, init=False)

    def add(self, *faults: Fault) -> None:
        """From now on make these *faults*, too.

        Raises:
            TypeError: Something that is no fault.
            ValueError: A task fault with ``task=`` for a task that does not run.
        """
        for fault in faults:
            _check_is_fault(fault)
            draw = random.Random(f"{self._seed}:fault:{self._added}")  # noqa: S311 - not secret
            armed = Armed(fault, draw, self._started_at)
            if isinstance(fault, TaskFault) and fault.task is not None:
                self._bend_now(fault, fault.task)
                armed.struck = 1
            self._armed.append(armed)
            self._added += 1

    def _bend_now(self, fault: TaskFault, task_id: str) -> None:
        def change(course: Course, now: float) -> Course:
            bent = fault.bend(course)
            return evolve(bent, ends_at=max(now, bent.ends_at))

        name = type(fault).__name__
        try:
            running = self._redirect(task_id, change)
        except KeyError:
            raise ValueError(
                f"{name}: no task {task_id!r} has been accepted; "
                "prompt= and nth= choose among the tasks to come"
            ) from None
        if not running:
            raise ValueError(f"{name}: task {task_id!r} has ended; add the fault while it runs")

    def clear(self) -> None:
        """Make no more faults; tasks already accepted keep theirs."""
        self._armed = []

    @property
    def active(self) -> tuple[Fault, ...]:
        """The faults in place."""
        return tuple(armed.fault for armed in self._armed)

    def struck(self, fault: Fault) -> int:
        """How many times *fault* has struck."""
        return sum(armed.struck for armed in self._armed if armed.fault == fault)

    def of_request(self, exchange: Exchange) -> list[tuple[RequestFault, Armed]]:
        """The request faults that strike *exchange*, each with its state."""
        if not self._armed:
            return []
        return [
            (fault, armed)
            for armed in self._armed
            if isinstance(fault := armed.fault, RequestFault)
            and (fault.route is None or exchange.route in fault.route)
            and fault.fits(exchange.task_ids, exchange.prompts)
            and armed.strikes(exchange.time)
        ]

    def bend(self, submission: Submission, course: Course, now: float) -> Course:
        """The course of a task after all task faults that strike it."""
        for armed in self._armed:
            fault = armed.fault
            if (
                isinstance(fault, TaskFault)
                and fault.fits((), (submission.prompt,))
                and armed.strikes(now)
            ):
                course = fault.bend(course)
        return course

    def forgeries(self, task_id: str, prompt: str, now: float) -> list[CallbackForged]:
        """The strangers' callbacks about a task that has just been accepted."""
        return [
            armed.fault
            for armed in self._armed
            if isinstance(armed.fault, CallbackForged)
            and armed.fault.fits((task_id,), (prompt,))
            and armed.strikes(now)
        ]

    def of_callback(self, task_id: str, prompt: str, now: float) -> list[CallbackFault]:
        """The faults that strike the callback of a task that has just ended."""
        return [
            armed.fault
            for armed in self._armed
            if isinstance(armed.fault, CallbackFault)
            and not isinstance(armed.fault, CallbackForged)
            and armed.fault.fits((task_id,), (prompt,))
            and armed.strikes(now)
        ]


def _check_is_fault(value: object) -> None:
    if isinstance(value, type) and issubclass(value, Fault):
        raise TypeError(f"{value.__name__} is a class, not a fault; write {value.__name__}()")
    if not isinstance(value, Fault):
        raise TypeError(f"{value!r} is no fault; see evolink_async.emulator.faults")


def kinds(of: type[Fault] = Fault) -> dict[str, type[Fault]]:
    """The faults there are, by name: all, or those that are *of* one base."""
    named = ((name, globals()[name]) for name in __all__)
    return {
        name: kind
        for name, kind in named
        if isinstance(kind, type) and issubclass(kind, of) and kind not in _BASES
    }


# Request faults


@frozen
class RequestFault(Fault):
    """Spoils the answer to a request, before or after the request has been processed."""

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
    retry_after: float | None = field(default=None, kw_only=True, validator=or_none(_SECONDS))
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
    """Resets the connection. ``Reset("after", route="submit")``: accepted, and nobody knows.

    Args:
        when: ``before`` the request is processed, ``during`` the answer (half of the body
            is sent), or ``after`` it is processed (nothing of the answer is sent).
    """

    when: str = field(default="before", validator=one_of("before", "during", "after"))

    async def before(self, exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        return _reset(exchange) if self.when == "before" else None

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "during":
            body = _body(response)
            stream = await _begin(exchange, response, len(body))
            await _write(exchange, stream, body[: len(body) // 2])
            # The half must reach the socket before the reset throws away what is unsent.
            await asyncio.sleep(0.01)
        return _reset(exchange)


@frozen
class Truncated(RequestFault):
    """Ends the body early and closes the connection. ``Truncated(20, route="read")``.

    Args:
        at: Bytes sent; less than none counts from the end.
    """

    at: int = field(default=20, validator=whole(-_BYTES, _BYTES))

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
        exchange.status = response.status
        return await _send(exchange, response, body[: self.at], len(body))


@frozen
class WrongLength(RequestFault):
    """Declares a length that is not the body's. ``WrongLength(-100, route="result")``.

    Args:
        by: Bytes declared too many; less than none for too few.
    """

    by: int = field(default=100, validator=whole(-_BYTES, _BYTES))

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
        exchange.status = response.status
        return await _send(exchange, response, body, max(0, len(body) + self.by))


@frozen
class Garbled(RequestFault):
    """Sends a body of the same length that makes no sense. ``Garbled(route="read", times=1)``.

    Args:
        body: What to send; None for the second half overwritten.
    """

    body: str | None = field(default=None, validator=or_none(UTF8))

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
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

    chunk: int = field(default=16, validator=whole(1, _BYTES))
    pause: float = field(default=0.05, validator=_REAL_SECONDS)

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
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
        stream = await _begin(exchange, response, len(_body(response)))
        while not _gone(exchange):  # noqa: ASYNC110 - a transport tells nobody that it closes
            await asyncio.sleep(0.02)
        return stream


@frozen
class NotAPicture(RequestFault):
    """Serves a page where a picture should be. ``NotAPicture(task=task.id)``.

    Args:
        content_type: What the answer says it is.
    """

    route: tuple[str, ...] | None = field(
        default=("result",), kw_only=True, converter=_several, validator=_ROUTE
    )
    content_type: str = field(default="image/png", validator=_MEDIA_TYPE)

    async def after(self, exchange: Exchange, _response: web.Response) -> web.StreamResponse:
        exchange.status = 200
        return web.Response(body=b"<html>no picture</html>", content_type=self.content_type)


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

    def spares(self, armed: Armed, now: float) -> bool:
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


@frozen
class Outage(RequestFault):
    """Answers nothing but one status for a while. ``Outage(10, 30, status=None)``.

    Args:
        start: Emulated seconds after the start of the emulator.
        seconds: How long, in emulated seconds.
        status: 503 and the like, without the API's JSON, as a proxy does; None resets
            every connection.
    """

    start: float = field(default=0.0, validator=_SECONDS)
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


def _body(response: web.Response) -> bytes:
    body = response.body
    return body if isinstance(body, bytes) else b""


def _gone(exchange: Exchange) -> bool:
    transport = exchange.request.transport
    return transport is None or transport.is_closing()


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
    if _gone(exchange):
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


# Task faults


@frozen
class TaskFault(Fault):
    """Changes the life of a task, decided when it is accepted, or when added with ``task``."""

    def check_together(self) -> None:
        if self.route is not None:
            self._refuse("route", "a task has no route; use prompt, task or nth")
        if self.task is not None:
            self._check_strikes_now()

    def _check_strikes_now(self) -> None:
        for name in ("prompt", "nth", "times", "between"):
            if getattr(self, name) is not None:
                self._refuse(name, "with task the fault strikes that one task, at once")
        if self.rate != 1:
            self._refuse("rate", "with task the fault strikes that one task, at once")

    def bend(self, course: Course) -> Course:
        """The course the task takes instead."""
        raise NotImplementedError


def _moment(course: Course, at: float) -> float:
    """The time at which the share *at* of the generation is over."""
    lasts = course.ends_at - course.starts_at
    return course.ends_at if math.isinf(lasts) else course.starts_at + at * lasts


@frozen
class TaskFails(TaskFault):
    """The generation fails. ``TaskFails("content_policy_violation", prompt="forbidden")``.

    Args:
        code: The task error's code, documented or not.
        message: The task error's message.
        at: The share of the generation after which it happens.
    """

    code: str = field(default="service_error", validator=NAME)
    message: str = field(default="a fault you asked for", validator=TEXT)
    at: float = field(default=0.5, kw_only=True, validator=_SHARE)

    def bend(self, course: Course) -> Course:
        return evolve(
            course,
            status="failed",
            ends_at=_moment(course, self.at),
            error_code=self.code,
            error_message=self.message,
        )


@frozen
class TaskCancelled(TaskFault):
    """The generation is cancelled by somebody. ``TaskCancelled(0.3, nth=2)``.

    Args:
        at: The share of the generation after which it happens.
    """

    at: float = field(default=0.5, validator=_SHARE)

    def bend(self, course: Course) -> Course:
        return evolve(
            course,
            status="cancelled",
            ends_at=_moment(course, self.at),
            error_code="request_cancelled",
            error_message="the request was cancelled",
        )


@frozen
class TaskHangs(TaskFault):
    """The generation never ends. ``TaskHangs(40, prompt="slow")``.

    Args:
        progress: The percentage at which it stays.
    """

    progress: int = field(default=50, validator=whole(0, 100))

    def bend(self, course: Course) -> Course:
        return evolve(course, ends_at=float("inf"), stuck_at=self.progress)


@frozen
class TaskVanishes(TaskFault):
    """The API forgets the task: 404 from then on. ``TaskVanishes(0.5, nth=2)``.

    Args:
        at: The share of the generation after which it happens.
    """

    at: float = field(default=0.5, validator=_SHARE)

    def bend(self, course: Course) -> Course:
        return evolve(course, vanishes_at=_moment(course, self.at))


@frozen
class TaskLags(TaskFault):
    """The API answers 404 at first, as a replica that lags behind. ``TaskLags(30.0)``.

    Args:
        seconds: How long, in emulated seconds after the submit.
    """

    seconds: float = field(default=30.0, validator=number(0, LONGEST, above=True))

    def check_together(self) -> None:
        super().check_together()
        if self.task is not None:
            self._refuse("task", "it strikes before anybody knows the id; use prompt or nth")

    def bend(self, course: Course) -> Course:
        return evolve(course, lag=self.seconds)


@frozen
class ProgressFallsBack(TaskFault):
    """The progress goes back in the second half. ``ProgressFallsBack(prompt="odd")``."""

    def bend(self, course: Course) -> Course:
        return evolve(course, falls_back=True)


@frozen
class UnknownStatus(TaskFault):
    """The status while processing is a new word. ``UnknownStatus("moderating")``.

    Args:
        word: The status word.
    """

    word: str = field(default="moderating", validator=NAME)

    def bend(self, course: Course) -> Course:
        return evolve(course, word=self.word)


@frozen
class FewerResults(TaskFault):
    """Fewer pictures than ordered, and fewer charged. ``FewerResults(1, prompt="four")``.

    Args:
        made: How many there are.
    """

    made: int = field(default=1, validator=whole(0, 3))

    def bend(self, course: Course) -> Course:
        return evolve(course, made=min(self.made, course.made))


# Callback faults


@frozen
class CallbackFault(Fault):
    """Spoils the callback of a task, decided when it is due."""

    def check_together(self) -> None:
        if self.route is not None:
            self._refuse("route", "a callback goes to no route; use prompt, task or nth")


@frozen
class CallbackDropped(CallbackFault):
    """The callback is never sent. ``CallbackDropped(rate=0.5)``."""


@frozen
class CallbackDelayed(CallbackFault):
    """The callback comes late. ``CallbackDelayed(120.0, prompt="lake")``.

    Args:
        seconds: How late, in emulated seconds.
    """

    seconds: float = field(default=30.0, validator=_SECONDS)


@frozen
class CallbackDuplicated(CallbackFault):
    """The callback comes again and again. ``CallbackDuplicated(3)``.

    Args:
        copies: How many times it is sent in all.
    """

    copies: int = field(default=2, validator=whole(2, 1000))


@frozen
class CallbackReordered(CallbackFault):
    """The callback is sent after the next task's. ``CallbackReordered(nth=1)``.

    If no other follows within *seconds* of emulated time, it is sent then.

    Args:
        seconds: How long it waits for another.
    """

    seconds: float = field(default=60.0, validator=_SECONDS)


@frozen
class CallbackForged(CallbackFault):
    """A stranger's callback comes first. ``CallbackForged("completed", prompt="lake")``.

    It is sent as soon as the task is accepted and says of the running task that it has ended.

    Args:
        status: The status it claims.
        url: The result it claims.
    """

    status: str = field(default="completed", validator=NAME)
    url: str = field(default="https://attacker.example/picture.png", validator=TEXT)

    def check_together(self) -> None:
        super().check_together()
        if self.task is not None:
            self._refuse("task", "it is sent before anybody knows the id; use prompt or nth")


_BASES = (Fault, RequestFault, TaskFault, CallbackFault)
