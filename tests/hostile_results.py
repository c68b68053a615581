"""A result host on loopback that behaves as badly as it is told to, and records what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Self

from attrs import define, field

__all__ = [
    "Behaviour",
    "Hit",
    "HostileHost",
    "cut",
    "endless",
    "png",
    "ranged",
    "raw",
    "redirect",
    "reply",
    "silent",
    "trickle",
]


@define
class Hit:
    """One request as it came."""

    method: str
    target: str
    headers: dict[str, str]


Behaviour = Callable[[Hit, asyncio.StreamWriter], Awaitable[None]]


@define
class HostileHost:
    """Each path has a list of behaviours, one per request; the last one stays."""

    hits: list[Hit] = field(factory=list, init=False)
    arrived: asyncio.Event = field(factory=asyncio.Event, init=False)
    open_now: int = field(default=0, init=False)
    most_open: int = field(default=0, init=False)
    _routes: dict[str, list[Behaviour]] = field(factory=dict, init=False)
    _server: asyncio.Server | None = field(default=None, init=False)
    _tasks: set[asyncio.Task[None]] = field(factory=set, init=False)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def url(self, path: str, *behaviours: Behaviour, host: str = "127.0.0.1") -> str:
        """A link to *path*, which from now on behaves so."""
        if behaviours:
            self._routes[path.partition("?")[0]] = list(behaviours)
        return f"http://{host}:{self.port}{path}"

    def hits_of(self, path: str) -> list[Hit]:
        """The requests for *path*."""
        return [hit for hit in self.hits if hit.target.partition("?")[0] == path]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            # A client that leaves, or our own end, is no news here.
            with contextlib.suppress(
                ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
            ):
                hit = _parse(await reader.readuntil(b"\r\n\r\n"))
                self.hits.append(hit)
                self.arrived.set()
                await self._next(hit)(hit, writer)
        finally:
            self.open_now -= 1
            writer.close()

    def _next(self, hit: Hit) -> Behaviour:
        behaviours = self._routes.get(hit.target.partition("?")[0], [reply(b"", 404)])
        return behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]


def _parse(head: bytes) -> Hit:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    return Hit(method, target, {name.title(): value.strip() for name, _, value in pairs})


def png(noise: int = 100, *, end: bool = True) -> bytes:
    """A picture of about *noise* bytes; without its last chunk unless *end*."""
    width = max(1, noise // 3)
    rows = b"\0" + random.Random(noise).randbytes(width * 3)
    header = struct.pack(">IIBBBBB", width, 1, 8, 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows, 0))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + (_chunk(b"IEND", b"") if end else b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"


def raw(data: bytes) -> Behaviour:
    """Send exactly this and close."""

    async def behave(_: Hit, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return behave


def reply(
    body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, length: bool = True
) -> Behaviour:
    """An ordinary answer; without Content-Length unless *length*."""
    given = dict(headers or {})
    if length:
        given.setdefault("Content-Length", str(len(body)))
    return raw(_head(status, given) + body)


def redirect(location: str, status: int = 302) -> Behaviour:
    """Lead elsewhere."""
    return reply(b"", status, {"Location": location})


def cut(body: bytes, after: int, headers: dict[str, str] | None = None) -> Behaviour:
    """Announce *body* and close after so many bytes of it."""
    return raw(_head(200, {"Content-Length": str(len(body)), **(headers or {})}) + body[:after])


def ranged(
    body: bytes,
    etag: str = '"v1"',
    *,
    after: int | None = None,
    hang: bool = False,
    total: str | None = None,
) -> Behaviour:
    """A host that can resume; sends *after* bytes of an answer, then closes, or stalls to *hang*.

    A client may lose the last bytes before a close, but none before a stall.
    """

    async def behave(hit: Hit, writer: asyncio.StreamWriter) -> None:
        start = int(hit.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        same = hit.headers.get("If-Range", etag) == etag
        start = start if same else 0
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(len(body) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{total or len(body)}"
        writer.write(_head(206 if start else 200, headers))
        writer.write(body[start:] if after is None else body[start : start + after])
        await writer.drain()
        if hang:
            await asyncio.Event().wait()

    return behave


def endless(first: bytes, headers: dict[str, str] | None = None, status: int = 200) -> Behaviour:
    """A body that never ends."""

    async def behave(_: Hit, writer: asyncio.StreamWriter) -> None:
        writer.write(_head(status, headers or {}) + first)
        while True:
            writer.write(b"\xa5" * 65536)
            await writer.drain()

    return behave


def silent(before: bytes = b"") -> Behaviour:
    """Send this, then nothing more, and never close."""

    async def behave(_: Hit, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        await writer.drain()
        await asyncio.Event().wait()

    return behave


def trickle(before: bytes, byte: bytes = b"x") -> Behaviour:
    """Send this, then one byte at a time, slowly, for ever."""

    async def behave(_: Hit, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while True:
            writer.write(byte)
            await writer.drain()
            await asyncio.sleep(0.005)

    return behave
