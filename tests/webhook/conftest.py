"""An emulator that calls back, and where its callbacks go."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from callback_server import PUBLIC, SECRET, CallbackServer

from evolink_async import Session
from evolink_async.emulator import Emulator, ManualClock
from evolink_async.webhook import CallbackReceiver


@pytest.fixture
async def server() -> AsyncIterator[CallbackServer]:
    """Where the emulator's callbacks go."""
    server = CallbackServer()
    await server.open()
    yield server
    await server.close()


@pytest.fixture
async def emulator(clock: ManualClock, server: CallbackServer) -> AsyncIterator[Emulator]:
    """An emulator that calls back; generations end before the first safety poll (at 37 s)."""
    async with Emulator(
        clock=clock,
        duration=(10, 30),
        pictures="tiny",
        credits=100_000,
        callback_origin=server.origin,
    ) as emulator:
        yield emulator


@pytest.fixture
async def receiver(session: Session, server: CallbackServer) -> CallbackReceiver:
    """The receiver of the session, behind the server."""
    server.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    return server.receiver


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client for deliveries of the test's own."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client:
        yield client
