"""A loopback HTTP server that behaves exactly as badly as it is told to, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from attrs import define, field

SNAPSHOT = {
    "created": 1757156493,
    "id": "task-unified-1757156493-imcg5zqt",
    "model": "wan2.5-text-to-image",
    "object": "image.generation.task",
    "progress": 0,
    "status": "pending",
    "task_info": {"can_cancel": True, "estimated_time": 30},
    "type": "image",
    "usage": {"billing_rule": "per_call", "credits_reserved": 1, "user_group": "default"},
}


def snapshot(**changes: Any) -> dict[str, Any]:
    """The documented task object with some fields changed."""
    return {**SNAPSHOT, **changes}


@define
class Received:
    """One request as it came off the wire."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@define
class Wire:
    """The server's end of one connection."""

    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Behaviour = Callable[[Received, Wire], Awaitable[None]]


def http(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """A complete HTTP/1.1 answer."""
    head = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{k}: {v}" for k, v in head.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def raw(data: bytes) -> Behaviour:
    """Send these bytes and close."""

    async def behave(_: Received, wire: Wire) -> None:
        await wire.send(data)
        wire.writer.close()

    return behave


def answer(status: int, value: Any = None, headers: Mapping[str, str] | None = None) -> Behaviour:
    """Answer properly, with a JSON body."""
    body = json.dumps(value).encode() if not isinstance(value, bytes) else value

    async def behave(_: Received, wire: Wire) -> None:
        await wire.send(http(status, body, headers))

    return behave


def error(status: int, code: object = None, **headers: str) -> Behaviour:
    """Answer with the API's documented error object."""
    told = {"code": status if code is None else code, "message": "told so", "type": "some_error"}
    return answer(status, {"error": told}, {k.replace("_", "-"): v for k, v in headers.items()})


async def cut(_: Received, wire: Wire) -> None:
    """Close without an answer."""
    wire.writer.close()


async def reset(_: Received, wire: Wire) -> None:
    """Reset the connection without an answer."""
    wire.reset()


async def hang(_: Received, wire: Wire) -> None:
    """Never answer."""
    await asyncio.Event().wait()


def cut_after(data: bytes, count: int) -> Behaviour:
    """Send the first *count* bytes of an answer and close."""
    return raw(data[:count])


@define
class HostileServer:
    """Answers the requests for a path with each of *script* in turn; the last one repeats.

    Attributes:
        script: Behaviours of submits (POST on anything but the batch read).
        reads: Behaviours of everything else.
        received: Every request that came in whole.
    """

    script: list[Behaviour] = field(factory=list)
    reads: list[Behaviour] = field(factory=list)
    received: list[Received] = field(factory=list, init=False)
    on_request: Callable[[Received], None] = field(default=lambda _: None)
    _server: asyncio.Server | None = field(default=None, init=False)
    _open: set[asyncio.Task[Any]] = field(factory=set, init=False)

    @property
    def base_url(self) -> str:
        if self._server is None:
            raise RuntimeError("not started")
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def posts(self) -> list[Received]:
        return [r for r in self.received if is_submit(r)]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        try:
            while not writer.is_closing() and (request := await _read(reader)) is not None:
                self.received.append(request)
                self.on_request(request)
                await self._next(request)(request, Wire(writer))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    def _next(self, request: Received) -> Behaviour:
        script = self.script if is_submit(request) else self.reads
        return script.pop(0) if len(script) > 1 else script[0]


def is_submit(request: Received) -> bool:
    return request.method == "POST" and request.path != "/v1/tasks/batch"


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {k.title(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("Content-Length", "0")))
    return Received(method, path, headers, body)
