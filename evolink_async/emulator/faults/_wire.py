"""Sending an answer otherwise than aiohttp does: in part, under a wrong length, or not at all."""

from __future__ import annotations

import asyncio
import socket
import struct

from aiohttp import web

from evolink_async.emulator._exchange import Exchange

__all__ = ["begin", "body_of", "has_left", "reset", "send", "write"]


def body_of(response: web.Response) -> bytes:
    body = response.body
    return body if isinstance(body, bytes) else b""


def has_left(exchange: Exchange) -> bool:
    transport = exchange.request.transport
    return transport is None or transport.is_closing()


def reset(exchange: Exchange) -> web.StreamResponse:
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


async def begin(
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


async def write(exchange: Exchange, stream: web.StreamResponse, data: bytes) -> bool:
    """Send more of the body; false once the client has gone."""
    if has_left(exchange):
        return False
    try:
        await stream.write(data)
    except ConnectionError:
        return False
    return True


async def send(
    exchange: Exchange, response: web.Response, body: bytes, declared: int
) -> web.StreamResponse:
    """Send *body* under a wrong length, then close."""
    stream = await begin(exchange, response, declared)
    await write(exchange, stream, body)
    transport = exchange.request.transport
    if transport is not None:
        if len(body) > declared:
            # Later, as the declared part alone makes a whole answer for the client.
            await asyncio.sleep(0.01)
            transport.write(body[declared:])
        transport.close()
    return stream
