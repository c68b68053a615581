"""One request on its way through the emulator, and its answer."""

from __future__ import annotations

import email.utils
import json
from typing import Any

from aiohttp import web
from attrs import define, field

from evolink_async.emulator._books import RequestRecord
from evolink_async.emulator._errors import ApiError

__all__ = ["Exchange", "http_date", "json_response", "read_object"]


@define(kw_only=True, eq=False)
class Exchange:
    """A request, what is known about it, and how it was answered.

    Attributes:
        task_ids: The ids it asks for; for a submit the id it was given.
        prompts: The prompts of the tasks it is about.
        status: Of the answer; None until there is one.
        string_codes: Whether documented errors carry string codes.
        without: Undocumented features to leave out of the answer.
    """

    request: web.Request
    route: str
    time: float
    request_id: str
    string_codes: bool
    without: frozenset[str]
    data: Any = None
    task_ids: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    replayed: bool = False
    status: int | None = None
    faults: list[str] = field(factory=list)

    @property
    def has_left(self) -> bool:
        """Whether the client has closed the connection."""
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def refuse(self, error: ApiError) -> web.Response:
        """The answer for *error*."""
        response = json_response(error.body(string_codes=self.string_codes), status=error.status)
        if error.retry_after is not None and "retry_after" not in self.without:
            response.headers["Retry-After"] = f"{error.retry_after:.15g}"
        return response

    def record(self) -> RequestRecord:
        """Its entry for the books."""
        headers = self.request.headers
        submit = self.route == "submit"
        return RequestRecord(
            time=self.time,
            method=self.request.method,
            path=self.request.raw_path,
            route=self.route,
            status=self.status,
            request_id=self.request_id,
            task_ids=self.task_ids,
            prompt=self.prompts[0] if submit and self.prompts else None,
            idempotency_key=headers.get("Idempotency-Key") if submit else None,
            replayed=self.replayed,
            authorized="Authorization" in headers,
            user_agent=headers.get("User-Agent", ""),
            faults=tuple(self.faults),
        )


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=json.dumps(body).encode(), status=status, content_type="application/json"
    )


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in the body of *request*.

    Raises:
        ApiError: 413 for a body that is too long, 400 for one that is not a JSON object.
    """
    try:
        data = json.loads(await request.read())
        json.dumps(data)  # refuses what is nested too deeply to be written
    except web.HTTPRequestEntityTooLarge:
        raise ApiError(413, f"the body has more than {request.client_max_size} bytes") from None
    except (ValueError, RecursionError, web.RequestPayloadError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    return data


def http_date(when: float) -> str:
    """*when*, in Unix seconds, as HTTP writes it."""
    return email.utils.formatdate(when, usegmt=True)
