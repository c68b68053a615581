"""A server on loopback for callbacks, and what tests of callbacks share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web
from attrs import asdict, define, field, frozen

from evolink_async import Session, Task
from evolink_async.emulator import Emulator, ManualClock, faults
from evolink_async.webhook import CallbackReceiver

PUBLIC = "https://app.example.com/hooks/evolink"
SECRET = "correct horse battery staple"
MODEL = "wan2.5-text-to-image"
KEY = "0123456789abcdef0123456789abcdef"

Make = Callable[..., CallbackReceiver]


@define
class CallbackServer:
    """An aiohttp.web application on loopback; its receiver may be set later."""

    receiver: CallbackReceiver | None = None
    origin: str = ""
    _runner: web.AppRunner | None = field(default=None, init=False)

    async def open(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/hooks/evolink/{token}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.origin = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        if self.receiver is None:
            return web.Response(status=503)
        return await self.receiver.aiohttp_handler(request)

    @property
    def port(self) -> int:
        return int(self.origin.rpartition(":")[2])

    def local(self, url: str) -> str:
        return url.replace("https://app.example.com", self.origin)


@frozen
class Held(faults.RequestFault):
    """Processes the request at once and answers when `release` is set."""

    arrived: asyncio.Event = field(factory=asyncio.Event, kw_only=True)
    release: asyncio.Event = field(factory=asyncio.Event, kw_only=True)

    async def after(self, _exchange: Any, response: web.Response) -> web.StreamResponse:
        self.arrived.set()
        await self.release.wait()
        return response


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until *condition()* holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)


async def submit_overtaken(session: Session, emulator: Emulator, server: CallbackServer) -> Task:
    """Submit a generation whose callback comes before the answer to the POST."""
    held = Held(route="submit")
    emulator.faults.add(held)
    submit = asyncio.create_task(session.submit("A lake"))
    await held.arrived.wait()
    assert isinstance(emulator.clock, ManualClock)
    emulator.clock.advance(31)  # the task has ended, and its first safety poll is not due
    await until(lambda: bool(emulator.books.callbacks()))
    assert server.receiver is not None
    assert counted(server.receiver) == {"early": 1}
    held.release.set()
    return await submit


def connect(emulator: Emulator, **settings: Any) -> Session:
    return Session(emulator.api_key, base_url=emulator.base_url, clock=emulator.clock, **settings)


def counted(receiver: CallbackReceiver) -> dict[str, int]:
    """What the receiver has counted, zeros left out."""
    return {name: count for name, count in asdict(receiver.stats).items() if count}


def url_of(task: Task) -> str:
    assert task.request is not None
    assert task.request.callback_url is not None
    return task.request.callback_url


def body(task_id: str, **more: Any) -> bytes:
    return json.dumps({"id": task_id, "status": "completed", "progress": 100, **more}).encode()


async def run(session: Session, emulator: Emulator, count: int) -> float:
    """Generate *count* at once; returns the mean delay from end to noticing."""
    tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(count)))
    delays: list[float] = []

    async def noticed(task: Task) -> None:
        await task
        delays.append(emulator.clock.now() - emulator.books.task(task.id).ends_at)

    await asyncio.gather(*map(noticed, tasks))
    return sum(delays) / count
