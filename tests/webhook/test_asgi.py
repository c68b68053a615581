"""The ASGI application of a receiver."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import aiohttp
import pytest
import uvicorn
from callback_server import KEY, body, counted, until, url_of

from evolink_async import Session
from evolink_async.emulator import Emulator
from evolink_async.webhook import CallbackReceiver

Message = MutableMapping[str, Any]


async def ask(
    receiver: CallbackReceiver, scope: dict[str, Any], *messages: dict[str, Any]
) -> list[Message]:
    """What the ASGI application sends when it is called like that."""
    incoming = list(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await receiver.asgi(scope, receive, send)
    return sent


def scope(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "headers": [], **more}


def chunk(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_asgi_deliveries(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """The ASGI application takes a delivery in pieces and answers with an empty 204."""
    task = await session.submit("A lake")
    data = body(task.id)
    sent = await ask(
        receiver, scope(url_of(task)), chunk(data[:5], more=True), chunk(data[5:], more=False)
    )
    assert sent == [
        {"type": "http.response.start", "status": 204, "headers": []},
        {"type": "http.response.body", "body": b""},
    ]
    assert counted(receiver) == {"nudged": 1}


@pytest.mark.parametrize(
    ("more", "messages", "status", "reason"),
    [
        ({"method": "GET"}, [], 405, "wrong_method"),
        ({"headers": [(b"content-encoding", b"br")]}, [], 415, "compressed"),
        ({"headers": [(b"content-length", b"999999")]}, [], 413, "too_large"),
        ({"headers": [(b"content-length", b"junk")]}, [chunk(b"")], 400, "malformed"),
        ({}, [chunk(b" " * 200_000, more=True)] * 2, 413, "too_large"),
        ({}, [chunk(b"{", more=True), {"type": "http.disconnect"}], 400, "malformed"),
        ({"path": "/hooks/evolink/x"}, [], 404, "forged"),
    ],
)
async def test_asgi_refusals(
    receiver: CallbackReceiver,
    more: dict[str, Any],
    messages: list[dict[str, Any]],
    status: int,
    reason: str,
) -> None:
    """A refused delivery is read no further, and under HTTP/1 its connection is closed."""
    given = scope(receiver.url_for(KEY)) | more
    start, _ = await ask(receiver, given, *messages)
    assert start["status"] == status
    assert dict(start["headers"])[b"connection"] == b"close"
    start, _ = await ask(receiver, given | {"http_version": "2"}, *messages)
    assert b"connection" not in dict(start["headers"])
    assert counted(receiver) == {reason: 2}


async def test_asgi_without_a_framework(receiver: CallbackReceiver) -> None:
    """On its own it acknowledges a server's start and stop, and closes websockets."""
    stages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = await ask(receiver, {"type": "lifespan"}, *stages)
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    (closed,) = await ask(receiver, {"type": "websocket"})
    assert closed["type"] == "websocket.close"
    assert receiver.stats.received == 0


async def test_asgi_under_a_server(
    receiver: CallbackReceiver, http: aiohttp.ClientSession, unused_tcp_port: int
) -> None:
    """A server recognises the application as ASGI 3 without being told."""
    config = uvicorn.Config(receiver.asgi, port=unused_tcp_port, ws="none", log_level="error")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started or serving.done())
    assert server.started
    url = receiver.url_for(KEY).replace(
        "https://app.example.com", f"http://127.0.0.1:{unused_tcp_port}"
    )
    async with http.post(url, data=body("task-unified-1")) as response:
        assert response.status == 204
    server.should_exit = True
    await serving
    assert counted(receiver) == {"early": 1}
