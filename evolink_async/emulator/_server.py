"""The emulator: the emulated service behind a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Self, TextIO

from aiohttp import web
from attrs import evolve

from evolink_async.emulator._background import Background
from evolink_async.emulator._books import Books
from evolink_async.emulator._callbacks import Callbacks
from evolink_async.emulator._clock import Clock, RealClock, held
from evolink_async.emulator._contract import OTHER_IMAGE_MODELS, Submission
from evolink_async.emulator._control import Control
from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._exchange import Exchange, http_date, json_response
from evolink_async.emulator._results import Results
from evolink_async.emulator._rules import NAME, TEXT
from evolink_async.emulator._service import Account, Duration, Service
from evolink_async.emulator._settings import check
from evolink_async.emulator._tasks import Course, GenerationTask
from evolink_async.emulator.faults import Armed, Fault, Faults, RequestFault

__all__ = ["Emulator", "serve"]

_Handler = Callable[[Exchange], Awaitable[web.Response]]


class Emulator:
    """The EvoLink API on loopback: no key, no money, no network.

    ::

        async with Emulator(duration=(2, 5)) as emulator:
            async with Session(emulator.api_key, base_url=emulator.base_url) as session:
                ...

    Args:
        host: The address to listen on.
        port: The port; 0 for any free one.
        api_key: The one key it accepts.
        credits: What the account has at first.
        price: Credits a result costs.
        duration: Seconds a generation takes: a number, the bounds ``(least, most)`` of a
            uniform law, or a function of the prompt and a `random.Random` seeded for this
            submit.
        estimate: The ``estimated_time`` at submit; None for what *duration* suggests.
        time_scale: Emulated seconds per real second; not together with *clock*.
        clock: Another clock, such as `ManualClock`, instead of the real time.
        pictures: ``full`` draws pictures worth looking at and needs pillow; ``tiny`` makes
            one-coloured ones of the true size and needs nothing.
        seed: Of everything drawn: durations, ids, faults with a rate.
        models: Image models it knows besides the documented ones.
        without: Undocumented features it shall not have, out of ``emulator.FEATURES``.
        string_codes: Errors carry codes such as ``invalid_request`` instead of the status.
        faults: Faults to start with; more by ``emulator.faults.add()``.
        callback_origin: Where callbacks are sent, such as ``http://127.0.0.1:8080``, whatever
            host they name: path and query are kept. None sends none. No other host is
            ever contacted.
        max_body: Bytes of a request beyond which the answer is 413.

    Raises:
        ValueError: A setting that is not what it may be.
        TypeError: Something among *faults* that is no fault.
        ImportError: ``pictures="full"`` without pillow.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str = "emulator-key",
        credits: float = 1000.0,  # noqa: A002 - the API's word
        price: float = 1.0,
        duration: Duration = (4.0, 9.0),
        estimate: float | None = None,
        time_scale: float = 1.0,
        clock: Clock | None = None,
        pictures: str = "full",
        seed: int = 0,
        models: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
        string_codes: bool = False,
        faults: tuple[Fault, ...] = (),
        callback_origin: str | None = None,
        max_body: int = 1 << 20,
    ) -> None:
        check({name: value for name, value in locals().items() if name != "self"})
        self.host = host
        self.port = port
        self.api_key = api_key
        self.clock: Clock = RealClock(time_scale) if clock is None else clock
        self.callback_origin = callback_origin
        self._string_codes = string_codes
        self._max_body = max_body
        self.without = frozenset(without)
        self._service = Service(
            clock=self.clock,
            account=Account(remaining=float(credits)),
            price=price,
            duration=duration,
            estimate=estimate,
            seed=seed,
            image_models=(*OTHER_IMAGE_MODELS, *models),
            without=self.without,
            bend=self._bend,
        )
        self.books = Books(self._service)
        self.faults = Faults(seed, self.clock.now(), self._redirect)
        self.faults.add(*faults)
        self._results = Results(pictures)
        self._request_numbers = itertools.count(1)
        self._dates: tuple[int, str] = (0, "")
        self._runner: web.AppRunner | None = None
        self._callbacks: Callbacks | None = None
        self._background: Background | None = None

    def __repr__(self) -> str:
        state = self.base_url if self._runner is not None else "not running"
        return f"Emulator({state}, {self.books!r})"

    @property
    def base_url(self) -> str:
        """The origin it serves, without a slash at the end."""
        return self._service.base_url

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        """Run in a thread and an event loop of its own, for programs without one."""
        self._background = Background(self)
        return self

    def __exit__(self, *_: object) -> None:
        background, self._background = self._background, None
        if background is not None:
            background.stop()

    async def start(self) -> None:
        """Listen, in the running event loop.

        Raises:
            RuntimeError: It is running already.
            OSError: The port is taken.
        """
        if self._runner is not None:
            raise RuntimeError("this emulator is running already")
        runner = web.AppRunner(
            self._application(), access_log=None, handle_signals=False, shutdown_timeout=0.2
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port, backlog=1024).start()
        except BaseException:
            await runner.cleanup()
            raise
        self.port = runner.addresses[0][1]
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._service.base_url = f"http://{host}:{self.port}"
        self._runner = runner
        if self.callback_origin is not None:
            self._callbacks = Callbacks(
                self.callback_origin, self.clock, self._service, self.faults, self.books
            )

    async def aclose(self) -> None:
        """Stop listening and close all connections; the books stay."""
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is not None:
            await callbacks.aclose()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def fail(self, task_id: str, code: str = "service_error", message: str = "") -> None:
        """Let a running task fail now; one that has ended stays as it is.

        Args:
            task_id: Which task.
            code: The task error's code, documented or not.
            message: The task error's message.

        Raises:
            KeyError: There is no such task.
            ValueError: A code or message that is no text, or an empty code.
        """
        NAME.check("code", code)
        TEXT.check("message", message)
        self._end(task_id, "failed", code, message or "a failure you asked for")

    def cancel(self, task_id: str) -> None:
        """Let a running task be cancelled now; one that has ended stays as it is.

        Raises:
            KeyError: There is no such task.
        """
        self._end(task_id, "cancelled", "request_cancelled", "the request was cancelled")

    def complete(self, task_id: str) -> None:
        """Let a running task complete now; one that has ended stays as it is.

        Raises:
            KeyError: There is no such task.
        """
        self._end(task_id, "completed", None, None)

    def _end(self, task_id: str, status: str, code: str | None, message: str | None) -> None:
        def change(course: Course, now: float) -> Course:
            return evolve(
                course, ends_at=now, status=status, error_code=code, error_message=message
            )

        self._redirect(task_id, change)

    def _redirect(self, task_id: str, change: Callable[[Course, float], Course]) -> bool:
        running = self._service.redirect(task_id, change)
        if self._callbacks is not None:
            self._callbacks.redirected(task_id)
        return running

    def _bend(self, submission: Submission, course: Course) -> Course:
        return self.faults.bend(submission, course, self.clock.now())

    # The way of a request

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=self._max_body, middlewares=[self._strays])
        for kind in ("image", "video", "audio"):
            self._route(app, "POST", f"/v1/{kind}s/generations", "submit", self._submitter(kind))
        task_id = "{task_id}"
        if "batch" not in self.without:
            self._route(app, "POST", "/v1/tasks/batch", "batch", self._read_many)
            task_id = "{task_id:(?!batch$)[^{}/]+}"  # a GET of the batch is a 405
        if "list" not in self.without:
            self._route(app, "GET", "/v1/tasks", "list", self._list)
        self._route(app, "GET", f"/v1/tasks/{task_id}", "read", self._read)
        self._route(app, "GET", "/v1/credits", "credits", self._credits)
        self._route(app, "GET", "/results/{secret}/{name}", "result", self._result)
        Control(self).add_to(app)
        return app

    def _route(
        self, app: web.Application, method: str, path: str, route: str, handler: _Handler
    ) -> None:
        async def endpoint(request: web.Request) -> web.StreamResponse:
            return await self._serve(request, route, handler)

        app.router.add_route(method, path, endpoint)

    @web.middleware
    async def _strays(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer in the API's JSON where no endpoint is."""
        stray = request.match_info.http_exception
        if stray is None:
            return await handler(request)

        async def refuse(exchange: Exchange) -> web.Response:
            response = exchange.refuse(
                ApiError(stray.status, f"no endpoint for {request.method} {request.path}")
            )
            if "Allow" in stray.headers:
                response.headers["Allow"] = stray.headers["Allow"]
            return response

        return await self._serve(request, "other", refuse)

    async def _serve(
        self, request: web.Request, route: str, handler: _Handler
    ) -> web.StreamResponse:
        with held(self.clock):
            exchange = Exchange(
                request=request,
                route=route,
                time=self.clock.now(),
                request_id=f"req-{next(self._request_numbers):08d}",
                string_codes=self._string_codes,
                without=self.without,
            )
            try:
                return await self._answer(exchange, handler)
            finally:
                self.books.record(exchange.record())

    async def _answer(self, exchange: Exchange, handler: _Handler) -> web.StreamResponse:
        refusal = await self._open(exchange)
        struck = self.faults.of_request(exchange)
        for fault, armed in struck:
            spoiled = await _instead(exchange, fault, armed)
            if spoiled is not None:
                return self._signed(exchange, spoiled)
        if refusal is None:
            try:
                response = await handler(exchange)
            except ApiError as error:
                response = exchange.refuse(error)
        else:
            response = exchange.refuse(refusal)
        self._signed(exchange, response)
        exchange.status = response.status
        return await _spoiled(exchange, response, struck) if struck else response

    async def _open(self, exchange: Exchange) -> ApiError | None:
        """Find out what *exchange* is about; an error if it shall not be processed."""
        request = exchange.request
        try:
            if exchange.route == "result":
                self._about(exchange, (request.match_info["name"].rpartition("-")[0],))
            elif exchange.route != "other":
                self.authorize(request)
                await self._open_call(exchange)
        except ApiError as error:
            return error
        return None

    async def _open_call(self, exchange: Exchange) -> None:
        if exchange.route == "read":
            self._about(exchange, (exchange.request.match_info["task_id"],))
        elif exchange.request.method == "POST":
            exchange.data = data = await self._object(exchange.request)
            if exchange.route == "submit":
                exchange.prompts = tuple(_strings([data.get("prompt")]))
            else:
                self._about(exchange, tuple(_strings(data.get("task_ids"))))

    async def _object(self, request: web.Request) -> dict[str, Any]:
        try:
            data = json.loads(await request.read())
            json.dumps(data)  # what is too deep to be written is too deep
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"the body has more than {self._max_body} bytes") from None
        except (ValueError, RecursionError, web.RequestPayloadError):
            raise ApiError(400, "the body is not JSON") from None
        if not isinstance(data, dict):
            raise ApiError(400, "the body must be a JSON object")
        return data

    def _about(self, exchange: Exchange, ids: tuple[str, ...]) -> None:
        tasks = self._service.tasks
        # Known ids are kept as the one string the task has: books of many reads stay small.
        exchange.task_ids = tuple(tasks[each].id if each in tasks else each for each in ids)
        if self.faults.active:
            found = (tasks.get(each) for each in ids)
            exchange.prompts = tuple(task.submission.prompt for task in found if task is not None)

    def authorize(self, request: web.Request) -> None:
        """Let *request* pass if it carries the key.

        Raises:
            ApiError: 401.
        """
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("utf-8", "surrogateescape"), self.api_key.encode()
        ):
            raise ApiError(401, "the API key is missing or wrong")

    def _signed(self, exchange: Exchange, response: web.StreamResponse) -> web.StreamResponse:
        """*response* with the headers every answer has; its date is the emulated one."""
        if "request_ids" not in self.without:
            response.headers["X-Request-Id"] = exchange.request_id
        second = int(exchange.time)
        if self._dates[0] != second:
            self._dates = second, http_date(second)
        response.headers["Date"] = self._dates[1]
        return response

    # The endpoints

    def _submitter(self, kind: str) -> _Handler:
        async def submit(exchange: Exchange) -> web.Response:
            key = exchange.request.headers.get("Idempotency-Key")
            reply = self._service.submit(kind, exchange.data, key)
            if reply.error is not None:
                response = exchange.refuse(reply.error)
            else:
                response = json_response(reply.body)
            if reply.replayed:
                exchange.replayed = True
                response.headers["Idempotency-Replayed"] = "true"
            if reply.task is not None:
                exchange.task_ids = (reply.task.id,)
                if not reply.replayed:
                    self._announce(reply.task)
            return response

        return submit

    def _announce(self, task: GenerationTask) -> None:
        """Have the callback of a task that has just been accepted sent."""
        if self._callbacks is not None and task.submission.callback_url is not None:
            self._callbacks.expect(task)

    async def _read(self, exchange: Exchange) -> web.Response:
        return json_response(self._service.read(exchange.request.match_info["task_id"]))

    async def _read_many(self, exchange: Exchange) -> web.Response:
        return json_response(self._service.read_many(exchange.data))

    async def _list(self, exchange: Exchange) -> web.Response:
        return json_response(self._service.list(dict(exchange.request.query)))

    async def _credits(self, _exchange: Exchange) -> web.Response:
        return json_response(self._service.credits())

    async def _result(self, exchange: Exchange) -> web.Response:
        match = exchange.request.match_info
        path = f"/results/{match['secret']}/{match['name']}"
        task = self._service.tasks.get(exchange.task_ids[0])
        return await self._results.answer(path, task, self._service.settle())


def _strings(values: Any) -> list[str]:
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else []


def _disconnected(exchange: Exchange) -> bool:
    transport = exchange.request.transport
    return transport is None or transport.is_closing()


async def _instead(
    exchange: Exchange, fault: RequestFault, armed: Armed
) -> web.StreamResponse | None:
    """The answer *fault* gives instead of processing, if it does."""
    exchange.faults.append(type(fault).__name__)
    response = await fault.before(exchange, armed)
    if response is not None and not _disconnected(exchange):
        exchange.status = response.status
    return response


async def _spoiled(
    exchange: Exchange, response: web.Response, struck: list[tuple[RequestFault, Armed]]
) -> web.StreamResponse:
    """What becomes of *response* after all that *struck*: the first that sends ends it."""
    for fault, _ in struck:
        exchange.status = None
        spoiled = await fault.after(exchange, response)
        if _disconnected(exchange) or not isinstance(spoiled, web.Response):
            return spoiled
        response = spoiled
        exchange.status = response.status
    return response


async def serve(emulator: Emulator, *, out: TextIO | None = None) -> None:
    """Run *emulator* until cancelled, after saying on *out* (stdout) where it is.

    Raises:
        OSError: The port is taken.
    """
    out = sys.stdout if out is None else out
    async with emulator:
        print(f"EVOLINK_BASE_URL={emulator.base_url}", file=out)
        print(f"EVOLINK_API_KEY={emulator.api_key}", file=out, flush=True)
        await asyncio.Event().wait()
