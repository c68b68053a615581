"""An emulator in a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolink_async.emulator._server import Emulator

__all__ = ["Background"]


class Background:
    """Runs *emulator* until stopped.

    Raises:
        Exception: What kept the emulator from starting.
    """

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="evolink-emulator", daemon=True
        )
        self._thread.start()
        self._loop = self._started.result()

    def stop(self) -> None:
        """Stop the emulator, and wait until it has stopped."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        try:
            await self._emulator.start()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._started.set_exception(error)
            return
        self._started.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        await self._emulator.aclose()
