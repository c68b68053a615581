"""The API's endpoints over HTTP: what happens to a request, faults included."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from attrs import define, field

from evolink_async.emulator._books import Books
from evolink_async.emulator._clock import Clock, held
from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._exchange import Exchange, http_date, json_response, read_object
from evolink_async.emulator._results import Results
from evolink_async.emulator._service import Service
from evolink_async.emulator._tasks import GenerationTask
from evolink_async.emulator.faults import Faults

__all__ = ["Endpoints"]

_Handler = Callable[[Exchange], Awaitable[web.Response]]


@define(kw_only=True, eq=False)
class Endpoints:
    """Answers requests and records them in the books.

    Attributes:
        accepted: Called with each task that has just been accepted.
        authorize: Raises the 401 for a request without the key.
    """

    service: Service
    faults: Faults
    books: Books
    clock: Clock
    results: Results
    accepted: Callable[[GenerationTask], None]
    authorize: Callable[[web.Request], None]
    string_codes: bool
    without: frozenset[str]
    max_body: int
    _request_numbers: itertools.count[int] = field(factory=lambda: itertools.count(1), init=False)

    def application(self) -> web.Application:
        """A web application with all endpoints."""
        app = web.Application(client_max_size=self.max_body, middlewares=[self._without_endpoint])
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
        return app

    def _route(
        self, app: web.Application, method: str, path: str, route: str, handler: _Handler
    ) -> None:
        async def endpoint(request: web.Request) -> web.StreamResponse:
            return await self._serve(request, route, handler)

        app.router.add_route(method, path, endpoint)

    @web.middleware
    async def _without_endpoint(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer in the API's JSON to a request for which there is no endpoint."""
        missing = request.match_info.http_exception
        if missing is None:
            return await handler(request)

        async def refuse(exchange: Exchange) -> web.Response:
            response = exchange.refuse(
                ApiError(missing.status, f"no endpoint for {request.method} {request.path}")
            )
            if "Allow" in missing.headers:
                response.headers["Allow"] = missing.headers["Allow"]
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
                string_codes=self.string_codes,
                without=self.without,
            )
            try:
                return await self._answer(exchange, handler)
            finally:
                self.books.record(exchange.record())

    async def _answer(self, exchange: Exchange, handler: _Handler) -> web.StreamResponse:
        """The answer, as the faults change it; the first fault that sends one is the last."""
        refusal: ApiError | None = None
        try:
            await self._open(exchange)
        except ApiError as error:
            refusal = error
        struck = self.faults.of_request(exchange)
        for fault, armed in struck:
            exchange.faults.append(type(fault).__name__)
            instead = await fault.before(exchange, armed)
            if instead is not None:
                if not exchange.has_left:
                    exchange.status = instead.status
                return self._signed(exchange, instead)
        try:
            if refusal is not None:
                raise refusal
            response = await handler(exchange)
        except ApiError as error:
            response = exchange.refuse(error)
        self._signed(exchange, response)
        exchange.status = response.status
        for fault, _ in struck:
            exchange.status = None
            sent = await fault.after(exchange, response)
            if exchange.has_left or not isinstance(sent, web.Response):
                return sent
            response = sent
            exchange.status = response.status
        return response

    async def _open(self, exchange: Exchange) -> None:
        """Read the ids and prompts of a request.

        Raises:
            ApiError: It is not to be processed.
        """
        request = exchange.request
        if exchange.route == "result":
            self._about(exchange, [request.match_info["name"].rpartition("-")[0]])
        elif exchange.route != "other":
            self.authorize(request)
        if exchange.route == "read":
            self._about(exchange, [request.match_info["task_id"]])
        elif exchange.route in {"submit", "batch"}:
            exchange.data = data = await read_object(request)
            if exchange.route == "submit":
                exchange.prompts = tuple(_strings([data.get("prompt")]))
            else:
                self._about(exchange, _strings(data.get("task_ids")))

    def _about(self, exchange: Exchange, ids: list[str]) -> None:
        tasks = self.service.tasks
        # The task's own string, so that the books of many reads stay small.
        exchange.task_ids = tuple(tasks[each].id if each in tasks else each for each in ids)
        if self.faults.active:
            found = (tasks.get(each) for each in ids)
            exchange.prompts = tuple(task.submission.prompt for task in found if task is not None)

    def _signed(self, exchange: Exchange, response: web.StreamResponse) -> web.StreamResponse:
        """*response* with the headers that every answer has; the date is the emulated one."""
        if "request_ids" not in self.without:
            response.headers["X-Request-Id"] = exchange.request_id
        response.headers["Date"] = http_date(exchange.time)
        return response

    # The endpoints

    def _submitter(self, kind: str) -> _Handler:
        async def submit(exchange: Exchange) -> web.Response:
            key = exchange.request.headers.get("Idempotency-Key")
            reply = self.service.submit(kind, exchange.data, key)
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
                    self.accepted(reply.task)
            return response

        return submit

    async def _read(self, exchange: Exchange) -> web.Response:
        return json_response(self.service.read(exchange.request.match_info["task_id"]))

    async def _read_many(self, exchange: Exchange) -> web.Response:
        return json_response(self.service.read_many(exchange.data))

    async def _list(self, exchange: Exchange) -> web.Response:
        return json_response(self.service.list(dict(exchange.request.query)))

    async def _credits(self, _exchange: Exchange) -> web.Response:
        return json_response(self.service.credits())

    async def _result(self, exchange: Exchange) -> web.Response:
        match = exchange.request.match_info
        path = f"/results/{match['secret']}/{match['name']}"
        task = self.service.tasks.get(exchange.task_ids[0])
        return await self.results.answer(path, task, self.service.settle())


def _strings(values: Any) -> list[str]:
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else []
