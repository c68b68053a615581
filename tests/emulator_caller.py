"""A bare caller of the API, so that the emulator is tested without the package's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from attrs import frozen

from evolink_async.emulator import Emulator

IMAGES = "/v1/images/generations"
ORDER = {"model": "wan2.5-text-to-image", "prompt": "A peaceful lake"}


@frozen
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


@frozen
class Caller:
    """Sends requests with the emulator's key, each within ten seconds."""

    http: aiohttp.ClientSession

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        async with asyncio.timeout(10), self.http.request(method, path, **options) as response:
            body = await response.read()
            return Answer(response.status, dict(response.headers), body)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.call("POST", path, json=body, **options)

    async def submit(self, key: str | None = None, **fields: Any) -> Answer:
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.post(IMAGES, {**ORDER, **fields}, headers=headers)

    async def task(self, **fields: Any) -> str:
        """The id of an accepted submit."""
        name = (await self.submit(**fields)).json["id"]
        assert isinstance(name, str)
        return name

    async def read(self, task_id: str) -> Any:
        return (await self.get(f"/v1/tasks/{task_id}")).json


@asynccontextmanager
async def calling(emulator: Emulator) -> AsyncIterator[Caller]:
    """A caller of *emulator*, with a connection for each request."""
    async with aiohttp.ClientSession(
        emulator.base_url,
        headers={"Authorization": f"Bearer {emulator.api_key}"},
        connector=aiohttp.TCPConnector(force_close=True),
    ) as http:
        yield Caller(http)
