"""Control over HTTP, under ``/_emulator``, with the emulator's key as for the API.

=========================== ======================================================
``GET  /books``             the totals
``GET  /books/requests``    every request; ``?route=&status=&task=&prompt=``
``GET  /books/tasks``       every accepted task; ``?prompt=&status=``
``GET  /books/callbacks``   every callback sent; ``?task=``
``GET  /faults``            the faults in place, each as it can be POSTed again
``POST /faults``            one more: ``{"fault": "Status", "status": 503, "nth": 3}``
``DELETE /faults``          no more faults
``GET  /clock``             the time
``POST /clock``             ``{"advance": 60}``, on a clock that can be moved
``POST /tasks/{task_id}``   end a task: ``{"status": "failed", "code": "service_error"}``
=========================== ======================================================

``prompt`` is the whole prompt in the books, and a part of it in a fault. These requests are not
in the books, and no fault strikes them. A request that is not understood is answered with 400.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from aiohttp import web
from attrs import asdict, fields_dict

from evolink_async.emulator import faults
from evolink_async.emulator._books import CallbackRecord, RequestRecord, TaskRecord, as_json
from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._exchange import json_response, read_object
from evolink_async.emulator._rules import LONGEST, number, one_of

if TYPE_CHECKING:
    from evolink_async.emulator._server import Emulator

__all__ = ["Control", "document"]


class Control:
    """The handlers of these paths."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator

    def add_to(self, app: web.Application) -> None:
        """Add the paths, and ``/openapi.json``, to *app*."""
        routes: tuple[tuple[str, str, Callable[[web.Request], Awaitable[Any]]], ...] = (
            ("GET", "/books", self._totals),
            ("GET", "/books/requests", self._requests),
            ("GET", "/books/tasks", self._tasks),
            ("GET", "/books/callbacks", self._callbacks),
            ("GET", "/faults", self._faults),
            ("POST", "/faults", self._add_fault),
            ("DELETE", "/faults", self._clear_faults),
            ("GET", "/clock", self._clock),
            ("POST", "/clock", self._advance),
            ("POST", "/tasks/{task_id}", self._end),
        )
        for method, path, handler in routes:
            app.router.add_route(method, f"/_emulator{path}", self._guarded(handler))
        app.router.add_get("/openapi.json", self._openapi)

    def _guarded(
        self, handler: Callable[[web.Request], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def guarded(request: web.Request) -> web.Response:
            try:
                self._emulator.authorize(request)
                return json_response(await handler(request))
            except ValueError as error:
                refusal = ApiError(400, str(error))
            except ApiError as error:
                refusal = error
            return json_response(refusal.body(), status=refusal.status)

        return guarded

    async def _openapi(self, _request: web.Request) -> web.Response:
        return json_response(document(self._emulator.base_url, self._emulator.without))

    async def _totals(self, _request: web.Request) -> Any:
        return self._emulator.books.summary()

    async def _requests(self, request: web.Request) -> Any:
        query: dict[str, Any] = _query(request, "route", "status", "task", "prompt")
        if "status" in query:
            if not query["status"].isdecimal():
                raise ValueError("status must be a number")
            query["status"] = int(query["status"])
        return _listed(self._emulator.books.requests(**query))

    async def _tasks(self, request: web.Request) -> Any:
        return _listed(self._emulator.books.tasks(**_query(request, "prompt", "status")))

    async def _callbacks(self, request: web.Request) -> Any:
        return _listed(self._emulator.books.callbacks(**_query(request, "task")))

    async def _faults(self, _request: web.Request) -> Any:
        return {
            "data": [
                {"fault": type(fault).__name__, **asdict(fault)}
                for fault in self._emulator.faults.active
            ]
        }

    async def _add_fault(self, request: web.Request) -> Any:
        fields = await read_object(request)
        try:
            self._emulator.faults.add(_fault(fields))
        except ValueError as error:
            raise ApiError(400, str(error), param="fault") from error
        return await self._faults(request)

    async def _clear_faults(self, request: web.Request) -> Any:
        self._emulator.faults.clear()
        return await self._faults(request)

    async def _clock(self, _request: web.Request) -> Any:
        return {"now": self._emulator.clock.now()}

    async def _advance(self, request: web.Request) -> Any:
        advance = getattr(self._emulator.clock, "advance", None)
        if advance is None:
            raise ApiError(400, "this emulator runs on a clock that cannot be moved")
        seconds = (await read_object(request)).get("advance")
        number(0, LONGEST).check("advance", seconds)
        advance(seconds)
        return await self._clock(request)

    async def _end(self, request: web.Request) -> Any:
        fields = await read_object(request)
        task_id = request.match_info["task_id"]
        emulator = self._emulator
        ends: dict[Any, Callable[..., None]] = {
            "completed": emulator.complete,
            "failed": emulator.fail,
            "cancelled": emulator.cancel,
        }
        status = fields.pop("status", None)
        one_of(*ends).check("status", status)
        try:
            ends[status](task_id, **fields)
        except KeyError:
            raise ApiError(404, f"task {task_id!r} not found") from None
        except TypeError as error:
            raise ApiError(400, "a failed task may have a code and a message") from error
        return as_json(emulator.books.task(task_id))


def _fault(fields: dict[str, Any]) -> faults.Fault:
    """The fault that has its class's name under ``fault``, and its fields beside it.

    Raises:
        ValueError: There is no such fault, or it has no such field or value.
    """
    known = faults.kinds()
    name = fields.pop("fault", None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"fault must be one of {', '.join(known)}")
    names = fields_dict(known[name])
    for field in fields:
        if field not in names:
            raise ValueError(f"{name} has no {field[:100]!r}, only {', '.join(names)}")
    return known[name](**fields)


def _query(request: web.Request, *allowed: str) -> dict[str, str]:
    for name in request.query:
        if name not in allowed:
            raise ValueError(f"the query may have {', '.join(allowed)}, not {name[:100]!r}")
    return dict(request.query)


def _listed(records: tuple[RequestRecord | TaskRecord | CallbackRecord, ...]) -> dict[str, Any]:
    return {"data": [as_json(each) for each in records]}


def document(base_url: str, without: frozenset[str]) -> dict[str, Any]:
    """The API as an OpenAPI 3.1 document: that of an emulator at *base_url* *without* features.

    What a schema cannot say, such as the number of pixels in a size, is in formats of our own:
    ``evolink-size``, ``evolink-callback-url``.
    """
    text = files("evolink_async.emulator").joinpath("openapi.json").read_text(encoding="utf-8")
    api: dict[str, Any] = json.loads(text)
    api["servers"] = [{"url": base_url}]
    for feature, path in {"batch": "/v1/tasks/batch", "list": "/v1/tasks"}.items():
        if feature in without:
            del api["paths"][path]
    return api
