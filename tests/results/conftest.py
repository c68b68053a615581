"""A host of results and a client that fetches from it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hostile_results import HostileHost

from evolink_async._results.fetch import ResultClient


@pytest.fixture
async def host() -> AsyncIterator[HostileHost]:
    async with HostileHost() as host:
        yield host


@pytest.fixture
async def client() -> AsyncIterator[ResultClient]:
    client = ResultClient(allow_loopback=True, connect_timeout=1.0, stall_timeout=0.2)
    yield client
    await client.aclose()
