"""What an emulator can be told to do wrong: one class for each thing a client may meet.

Every fault says where and when it strikes, in keywords they all share::

    emulator.faults.add(Status(503, retry_after=2, route="submit", nth=3))
    emulator.faults.add(TaskFails("content_policy_violation", prompt="forbidden"))
    emulator.faults.add(Reset("after", route="submit", rate=0.2))

* ``route``: one of `ROUTES`, or several; None for any.
* ``task``: only requests about this task id.
* ``prompt``: only submits and tasks whose prompt contains this.
* ``nth``: only the n-th that fits all of the above, counted from 1; or several.
* ``times``: strike at most so many times.
* ``rate``: strike this share of what fits, drawn with the emulator's seed.
* ``between``: only from the one to the other, in emulated seconds since the start.

*Request faults* spoil an answer, *task faults* the life of a task, decided at its submit,
*callback faults* the callbacks. Waiting inside a request is real time, as a client's
HTTP time-outs are; everything else is the emulator's time.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from aiohttp import web
from attrs import Attribute, define, evolve, field, frozen
from attrs.validators import in_

from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._exchange import Exchange, http_date

if TYPE_CHECKING:
    from evolink_async.emulator._contract import Submission
    from evolink_async.emulator._tasks import Course

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
]

ROUTES = ("submit", "read", "batch", "list", "credits", "result")
"""What ``route`` may name: the API's endpoints, and the links to the results."""


def _several(value: Any) -> Any:
    """One or several, as a tuple."""
    if value is None or isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, (list, range, set, frozenset)) else (value,)


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_KINDS: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "float": (int, float),
    "int": int,
    "str": str,
}


def _typed(_: type, fields: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """Check each plain field against its annotation: faults also come as JSON."""
    return [
        each.evolve(validator=_is_of_its_type)
        if each.validator is None and each.converter is None
        else each
        for each in fields
    ]


def _is_of_its_type(fault: Fault, field: Attribute[Any], value: Any) -> None:
    words = str(field.type).split(" | ")
    if not any(
        value is None if word == "None" else isinstance(value, _KINDS[word]) for word in words
    ):
        raise TypeError(f"{type(fault).__name__}: {field.name} must be {field.type}, not {value!r}")


@frozen(field_transformer=_typed)
class Fault:
    """Where and when something goes wrong; see the module for the keywords."""

    route: tuple[str, ...] | None = field(default=None, kw_only=True, converter=_several)
    task: str | None = field(default=None, kw_only=True)
    prompt: str | None = field(default=None, kw_only=True)
    nth: tuple[int, ...] | None = field(default=None, kw_only=True, converter=_several)
    times: int | None = field(default=None, kw_only=True)
    rate: float = field(default=1.0, kw_only=True)
    between: tuple[float, float] | None = field(default=None, kw_only=True, converter=_pair)

    def __attrs_post_init__(self) -> None:
        for name in self.route or ():
            if name not in ROUTES:
                raise ValueError(f"route must be among {', '.join(ROUTES)}; not {name!r}")
        if not all(isinstance(each, int) and each > 0 for each in self.nth or ()):
            raise ValueError(f"nth must be numbers counted from 1, not {self.nth!r}")
        if self.between is not None and [isinstance(at, (int, float)) for at in self.between] != [
            True,
            True,
        ]:
            raise ValueError(f"between must be two numbers of seconds, not {self.between!r}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, not {self.rate!r}")

    @property
    def window(self) -> tuple[float, float] | None:
        """When it may strike, in seconds since the start of the emulator; None for always."""
        return self.between

    def spares(self, _armed: Armed, _now: float) -> bool:
        """Whether it lets this occasion pass for reasons of its own."""
        return False

    def fits(self, route: str | None, task_ids: tuple[str, ...], prompts: tuple[str, ...]) -> bool:
        """Whether it is about this request or task at all."""
        return (
            (self.route is None or route is None or route in self.route)
            and (self.task is None or self.task in task_ids)
            and (self.prompt is None or any(self.prompt in prompt for prompt in prompts))
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
    _armed: list[Armed] = field(factory=list, init=False)
    _added: int = field(default=0, init=False)

    def add(self, *faults: Fault) -> None:
        """From now on make these *faults*, too.

        Raises:
            TypeError: Something that is no fault.
        """
        for fault in faults:
            if not isinstance(fault, Fault):
                raise TypeError(f"{fault!r} is no fault; see evolink_async.emulator.faults")
            draw = random.Random(f"{self._seed}:fault:{self._added}")  # noqa: S311 - not secret
            self._armed.append(Armed(fault, draw, self._started_at))
            self._added += 1

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
        about = exchange.route, exchange.task_ids, exchange.prompts
        return [
            (fault, armed)
            for armed in self._armed
            if isinstance(fault := armed.fault, RequestFault)
            and fault.fits(*about)
            and armed.strikes(exchange.time)
        ]

    def bend(self, submission: Submission, course: Course, now: float) -> Course:
        """The course of a task after all task faults that strike it."""
        for armed in self._armed:
            fault = armed.fault
            if (
                isinstance(fault, TaskFault)
                and fault.fits(None, (), (submission.prompt,))
                and armed.strikes(now)
            ):
                course = fault.bend(course)
        return course

    def of_callback(self, task_id: str, prompt: str, now: float) -> list[CallbackFault]:
        """The callback faults that strike the callback of a task."""
        return [
            armed.fault
            for armed in self._armed
            if isinstance(armed.fault, CallbackFault)
            and armed.fault.fits(None, (task_id,), (prompt,))
            and armed.strikes(now)
        ]


# Request faults


@frozen(field_transformer=_typed)
class RequestFault(Fault):
    """Spoils the answer to a request, before or after the request has been processed."""

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        """An answer instead of processing, or None."""
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        """What to send instead of *response*, the answer to the processed request."""
        return response


@frozen(field_transformer=_typed)
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

    status: int = 503
    message: str = "a fault you asked for"
    code: str | None = field(default=None, kw_only=True)
    kind: str | None = field(default=None, kw_only=True)
    retry_after: float | None = field(default=None, kw_only=True)
    as_date: bool = field(default=False, kw_only=True)
    body: str | None = field(default=None, kw_only=True)
    location: str | None = field(default=None, kw_only=True)
    processed: bool = field(default=False, kw_only=True)
    replayed: bool = field(default=False, kw_only=True)

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
                else f"{self.retry_after:g}"
            )
        if self.location is not None:
            response.headers["Location"] = self.location
        if self.replayed:
            response.headers["Idempotency-Replayed"] = "true"
        return response


@frozen(field_transformer=_typed)
class Latency(RequestFault):
    """Answers late. ``Latency(0.02, "after", route="submit")``.

    Args:
        seconds: Of real time.
        when: ``before`` or ``after`` the request is processed.
    """

    seconds: float = 0.05
    when: str = field(default="before", validator=in_(("before", "after")))

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        if self.when == "before":
            await asyncio.sleep(self.seconds)
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "after":
            await asyncio.sleep(self.seconds)
        return response


@frozen(field_transformer=_typed)
class Reset(RequestFault):
    """Resets the connection. ``Reset("after", route="submit")``: accepted, and nobody knows.

    Args:
        when: ``before`` the request is processed, ``during`` the answer (half of the body
            is sent), or ``after`` it is processed (nothing of the answer is sent).
    """

    when: str = field(default="before", validator=in_(("before", "during", "after")))

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


@frozen(field_transformer=_typed)
class Truncated(RequestFault):
    """Ends the body early and closes the connection. ``Truncated(20, route="read")``.

    Args:
        at: Bytes sent; less than none counts from the end.
    """

    at: int = 20

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
        exchange.status = response.status
        return await _send(exchange, response, body[: self.at], len(body))


@frozen(field_transformer=_typed)
class WrongLength(RequestFault):
    """Declares a length that is not the body's. ``WrongLength(-100, route="result")``.

    Args:
        by: Bytes declared too many; less than none for too few.
    """

    by: int = 100

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
        exchange.status = response.status
        return await _send(exchange, response, body, max(0, len(body) + self.by))


@frozen(field_transformer=_typed)
class Garbled(RequestFault):
    """Sends a body of the same length that makes no sense. ``Garbled(route="batch", times=1)``.

    Args:
        body: What to send; None for the second half overwritten.
    """

    body: str | None = None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
        half = len(body) // 2
        response.body = (
            body[:half] + b"\xff" * (len(body) - half) if self.body is None else self.body.encode()
        )
        return response


@frozen(field_transformer=_typed)
class SlowDrip(RequestFault):
    """Sends the body in drops. ``SlowDrip(64, 0.05, route="result")``.

    Args:
        chunk: Bytes a drop.
        pause: Real seconds between two drops.
    """

    chunk: int = 16
    pause: float = 0.05

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        body = _body(response)
        stream = await _begin(exchange, response, len(body))
        for start in range(0, len(body), self.chunk):
            if not await _write(exchange, stream, body[start : start + self.chunk]):
                return stream
            await asyncio.sleep(self.pause)
        exchange.status = response.status
        return stream


@frozen(field_transformer=_typed)
class Endless(RequestFault):
    """Never stops sending blanks, which JSON allows. ``Endless(route="read", nth=2)``."""

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        stream = await _begin(exchange, response, None)
        while await _write(exchange, stream, b" " * 65536):  # noqa: ASYNC110 - lets others run
            await asyncio.sleep(0)
        return stream


@frozen(field_transformer=_typed)
class Stalled(RequestFault):
    """Sends the head and then nothing until the client leaves. ``Stalled(route="result")``."""

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        stream = await _begin(exchange, response, len(_body(response)))
        while not _gone(exchange):  # noqa: ASYNC110 - a transport tells nobody that it closes
            await asyncio.sleep(0.02)
        return stream


@frozen(field_transformer=_typed)
class NotAPicture(RequestFault):
    """Serves a page where a picture should be. ``NotAPicture(task=task.id)``.

    Args:
        content_type: What the answer says it is.
    """

    route: tuple[str, ...] | None = field(default=("result",), kw_only=True, converter=_several)
    content_type: str = "image/png"

    async def after(self, exchange: Exchange, _response: web.Response) -> web.StreamResponse:
        exchange.status = 200
        return web.Response(body=b"<html>no picture</html>", content_type=self.content_type)


@frozen(field_transformer=_typed)
class RateLimit(RequestFault):
    """Answers 429 beyond a rate. ``RateLimit(10, 1.0, route="submit")``.

    Args:
        requests: How many that fit pass in any *per* seconds.
        per: Emulated seconds.
        retry_after: Send the header that says when the next one passes.
    """

    requests: int = 10
    per: float = 1.0
    retry_after: bool = field(default=True, kw_only=True)

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


@frozen(field_transformer=_typed)
class Outage(RequestFault):
    """Answers nothing but one status for a while. ``Outage(10, 30, status=None)``.

    Args:
        start: Emulated seconds after the start of the emulator.
        seconds: How long, in emulated seconds.
        status: 503 and the like, without the API's JSON, as a proxy does; None resets
            every connection.
    """

    start: float = 0.0
    seconds: float = 60.0
    status: int | None = 503

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


@frozen(field_transformer=_typed)
class TaskFault(Fault):
    """Changes the life of a task, decided when it is accepted."""

    def bend(self, course: Course) -> Course:
        """The course the task takes instead."""
        raise NotImplementedError


def _moment(course: Course, at: float) -> float:
    """The time at which the share *at* of the generation is over."""
    return course.starts_at + at * (course.ends_at - course.starts_at)


@frozen(field_transformer=_typed)
class TaskFails(TaskFault):
    """The generation fails. ``TaskFails("content_policy_violation", prompt="forbidden")``.

    Args:
        code: The task error's code, documented or not.
        message: The task error's message.
        at: The share of the generation after which it happens.
    """

    code: str = "service_error"
    message: str = "a fault you asked for"
    at: float = field(default=0.5, kw_only=True)

    def bend(self, course: Course) -> Course:
        return evolve(
            course,
            status="failed",
            ends_at=_moment(course, self.at),
            error_code=self.code,
            error_message=self.message,
        )


@frozen(field_transformer=_typed)
class TaskCancelled(TaskFault):
    """The generation is cancelled by somebody. ``TaskCancelled(0.3, nth=2)``.

    Args:
        at: The share of the generation after which it happens.
    """

    at: float = 0.5

    def bend(self, course: Course) -> Course:
        return evolve(
            course,
            status="cancelled",
            ends_at=_moment(course, self.at),
            error_code="request_cancelled",
            error_message="the request was cancelled",
        )


@frozen(field_transformer=_typed)
class TaskHangs(TaskFault):
    """The generation never ends. ``TaskHangs(40, prompt="slow")``.

    Args:
        progress: The percentage at which it stays.
    """

    progress: int = 50

    def bend(self, course: Course) -> Course:
        return evolve(course, ends_at=float("inf"), stuck_at=self.progress)


@frozen(field_transformer=_typed)
class TaskVanishes(TaskFault):
    """The API forgets the task: 404 from then on. ``TaskVanishes(0.5, rate=0.1)``.

    Args:
        at: The share of the generation after which it happens.
    """

    at: float = 0.5

    def bend(self, course: Course) -> Course:
        return evolve(course, vanishes_at=_moment(course, self.at))


@frozen(field_transformer=_typed)
class TaskLags(TaskFault):
    """The API answers 404 at first, as a replica that lags behind. ``TaskLags(3.0)``.

    Args:
        seconds: How long, in emulated seconds after the submit.
    """

    seconds: float = 3.0

    def bend(self, course: Course) -> Course:
        return evolve(course, lag=self.seconds)


@frozen(field_transformer=_typed)
class ProgressFallsBack(TaskFault):
    """The progress goes back in the second half. ``ProgressFallsBack(prompt="odd")``."""

    def bend(self, course: Course) -> Course:
        return evolve(course, falls_back=True)


@frozen(field_transformer=_typed)
class UnknownStatus(TaskFault):
    """The status while processing is a new word. ``UnknownStatus("moderating")``.

    Args:
        word: The status word.
    """

    word: str = "moderating"

    def bend(self, course: Course) -> Course:
        return evolve(course, word=self.word)


@frozen(field_transformer=_typed)
class FewerResults(TaskFault):
    """Fewer pictures than ordered, and fewer charged. ``FewerResults(1, prompt="four")``.

    Args:
        made: How many there are.
    """

    made: int = 1

    def bend(self, course: Course) -> Course:
        return evolve(course, made=min(self.made, course.made))


# Callback faults


@frozen(field_transformer=_typed)
class CallbackFault(Fault):
    """Spoils the callback of a task."""


@frozen(field_transformer=_typed)
class CallbackDropped(CallbackFault):
    """The callback is never sent. ``CallbackDropped(rate=0.5)``."""


@frozen(field_transformer=_typed)
class CallbackDelayed(CallbackFault):
    """The callback comes late. ``CallbackDelayed(120.0, prompt="lake")``.

    Args:
        seconds: How late, in emulated seconds.
    """

    seconds: float = 30.0


@frozen(field_transformer=_typed)
class CallbackDuplicated(CallbackFault):
    """The callback comes again and again. ``CallbackDuplicated(3)``.

    Args:
        copies: How many times it is sent in all.
    """

    copies: int = 2


@frozen(field_transformer=_typed)
class CallbackReordered(CallbackFault):
    """The callback is sent after the next task's. ``CallbackReordered(nth=1)``.

    If no other follows within *seconds* of emulated time, it is sent then.

    Args:
        seconds: How long it waits for another.
    """

    seconds: float = 60.0


@frozen(field_transformer=_typed)
class CallbackForged(CallbackFault):
    """A stranger's callback comes first. ``CallbackForged("completed", prompt="lake")``.

    It is sent as soon as the task is accepted and says of the running task that it has ended.

    Args:
        status: The status it claims.
        url: The result it claims.
    """

    status: str = "completed"
    url: str = "https://attacker.example/picture.png"
