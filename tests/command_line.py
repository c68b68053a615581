"""The command line in this process or another, for its tests."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, closing, contextmanager
from http.client import HTTPConnection
from typing import Any, Protocol, TypeVar

from attrs import frozen
from hostile import snapshot

from evolink_async.emulator import Emulator

T = TypeVar("T")

KEY = "sk-test-secret-0123456789"
TASK = snapshot()["id"]
EVOLINK = ("-m", "evolink_async")
CLEAR = "\x1b[2J\x1b]0;owned\x07"
UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@frozen
class Ended:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Run(Protocol):
    """Runs the command line in this process."""

    def __call__(self, *argv: str) -> Ended: ...


@contextmanager
def in_thread(server: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """*server* on an event loop of its own, beside the command under test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        started = asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10)
        try:
            yield started
        finally:
            stop = server.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(_awaited(stop), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _awaited(stop: Any) -> None:
    await stop
    await asyncio.sleep(0)


def submit(api: Emulator, **fields: Any) -> str:
    """Submit a task to *api* without the command line; returns its id."""
    fields = {"model": "wan2.5-text-to-image", "prompt": "A lake", **fields}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with closing(HTTPConnection(api.base_url.removeprefix("http://"))) as connection:
        connection.request("POST", "/v1/images/generations", json.dumps(fields), headers)
        task_id: str = json.load(connection.getresponse())["id"]
    return task_id


def python(code: str, *argv: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run *code* in a new interpreter."""
    return subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, **settings
    )
