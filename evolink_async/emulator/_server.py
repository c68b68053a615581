"""The emulator: the emulated service behind a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import hmac
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self, TextIO

from aiohttp import web
from attrs import evolve

from evolink_async.emulator._books import Books
from evolink_async.emulator._callbacks import Callbacks
from evolink_async.emulator._clock import Clock, RealClock
from evolink_async.emulator._contract import OTHER_IMAGE_MODELS
from evolink_async.emulator._control import Control
from evolink_async.emulator._endpoints import Endpoints
from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._results import Results
from evolink_async.emulator._rules import NAME, TEXT, check_settings
from evolink_async.emulator._service import Account, Duration, Service, Terms
from evolink_async.emulator._tasks import GenerationTask, Timeline
from evolink_async.emulator.faults import Fault, Faults

__all__ = ["Emulator", "serve"]


class Emulator:
    """The EvoLink API on loopback: no key, no money, no network.

    ::

        async with Emulator(duration=(2, 5)) as emulator:
            async with Session(emulator.api_key, base_url=emulator.base_url) as session:
                ...

    Args:
        host: The address to listen on.
        port: The port; 0 for any free one.
        api_key: The one key it accepts.
        credits: What the account has at first.
        price: Credits a result costs.
        duration: Seconds a generation takes: a number, the bounds ``(least, most)`` of a
            uniform law, or a function of the prompt and a `random.Random` seeded for this
            submit.
        estimate: The ``estimated_time`` at submit; None for what *duration* suggests.
        time_scale: Emulated seconds per real second; not together with *clock*.
        clock: Another clock, such as `ManualClock`, instead of the real time.
        pictures: ``full`` draws pictures worth looking at and needs pillow; ``tiny`` makes
            one-coloured ones of the true size and needs nothing.
        seed: Of everything drawn: durations, ids, faults with a rate.
        models: Image models it knows besides the documented ones.
        without: Undocumented features it does not have, out of ``emulator.FEATURES``.
        string_codes: Errors carry codes such as ``invalid_request`` instead of the status.
        faults: Faults to start with; more by ``emulator.faults.add()``.
        callback_origin: Where callbacks are sent, such as ``http://127.0.0.1:8080``, whatever
            host they name: path and query are kept. None sends none. No other host is
            ever contacted.
        max_body: Bytes of a request beyond which the answer is 413.

    Raises:
        ValueError: A setting that is not allowed.
        TypeError: *faults* contains something that is not a fault.
        ImportError: ``pictures="full"`` without pillow.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str = "emulator-key",
        credits: float = 1000.0,  # noqa: A002 - the API's word
        price: float = 1.0,
        duration: Duration = (4.0, 9.0),
        estimate: float | None = None,
        time_scale: float = 1.0,
        clock: Clock | None = None,
        pictures: str = "full",
        seed: int = 0,
        models: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
        string_codes: bool = False,
        faults: tuple[Fault, ...] = (),
        callback_origin: str | None = None,
        max_body: int = 1 << 20,
    ) -> None:
        check_settings({name: value for name, value in locals().items() if name != "self"})
        self.host = host
        self.port = port
        self.api_key = api_key
        self.clock: Clock = RealClock(time_scale) if clock is None else clock
        self.callback_origin = callback_origin
        self.without = frozenset(without)
        self.faults = Faults(seed, self.clock.now(), self._change_timeline)
        self._service = Service(
            clock=self.clock,
            account=Account(remaining=float(credits)),
            terms=Terms(
                price=price,
                duration=duration,
                estimate=estimate,
                seed=seed,
                image_models=(*OTHER_IMAGE_MODELS, *models),
                without=self.without,
            ),
            adjust=self.faults.adjust,
        )
        self.books = Books(self._service)
        self.faults.add(*faults)
        self._endpoints = Endpoints(
            service=self._service,
            faults=self.faults,
            books=self.books,
            clock=self.clock,
            results=Results(pictures),
            accepted=self._accepted,
            authorize=self.authorize,
            string_codes=string_codes,
            without=self.without,
            max_body=max_body,
        )
        self._runner: web.AppRunner | None = None
        self._callbacks: Callbacks | None = None
        self._background: tuple[threading.Thread, Callable[[], object]] | None = None

    def __repr__(self) -> str:
        state = self.base_url if self._runner is not None else "not running"
        return f"Emulator({state}, {self.books!r})"

    @property
    def base_url(self) -> str:
        """The origin it serves, without a slash at the end."""
        return self._service.base_url

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        """Run in a thread and an event loop of its own, for programs without one."""
        started: Future[Callable[[], object]] = Future()

        async def run() -> None:
            stop = asyncio.Event()
            try:
                await self.start()
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                started.set_exception(error)
                return
            loop = asyncio.get_running_loop()
            started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
            await stop.wait()
            await self.aclose()

        thread = threading.Thread(
            target=lambda: asyncio.run(run()), name="evolink-emulator", daemon=True
        )
        thread.start()
        self._background = thread, started.result()
        return self

    def __exit__(self, *_: object) -> None:
        if self._background is not None:
            thread, stop = self._background
            self._background = None
            stop()
            thread.join()

    async def start(self) -> None:
        """Listen, in the running event loop.

        Raises:
            RuntimeError: It is running already.
            OSError: The port is taken.
        """
        if self._runner is not None:
            raise RuntimeError("this emulator is running already")
        app = self._endpoints.application()
        Control(self).add_to(app)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port, backlog=1024).start()
        except BaseException:
            await runner.cleanup()
            raise
        self.port = runner.addresses[0][1]
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._service.base_url = f"http://{host}:{self.port}"
        self._runner = runner
        if self.callback_origin is not None:
            self._callbacks = Callbacks(
                self.callback_origin, self.clock, self._service, self.faults, self.books
            )

    async def aclose(self) -> None:
        """Stop listening and close all connections; the books stay."""
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is not None:
            await callbacks.aclose()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def fail(self, task_id: str, code: str = "service_error", message: str = "") -> None:
        """End a running task as failed; a task that has ended stays as it is.

        Args:
            task_id: Which task.
            code: The task error's code, documented or not.
            message: The task error's message.

        Raises:
            KeyError: There is no such task.
            ValueError: A code or message that is no text, or an empty code.
        """
        NAME.check("code", code)
        TEXT.check("message", message)
        self._end(task_id, "failed", code, message or "a failure you asked for")

    def cancel(self, task_id: str) -> None:
        """End a running task as cancelled; a task that has ended stays as it is.

        Raises:
            KeyError: There is no such task.
        """
        self._end(task_id, "cancelled", "request_cancelled", "the request was cancelled")

    def complete(self, task_id: str) -> None:
        """End a running task as completed; a task that has ended stays as it is.

        Raises:
            KeyError: There is no such task.
        """
        self._end(task_id, "completed", None, None)

    def _end(self, task_id: str, status: str, code: str | None, message: str | None) -> None:
        def change(timeline: Timeline, now: float) -> Timeline:
            return evolve(
                timeline, ends_at=now, status=status, error_code=code, error_message=message
            )

        self._change_timeline(task_id, change)

    def _change_timeline(self, task_id: str, change: Callable[[Timeline, float], Timeline]) -> bool:
        running = self._service.change_timeline(task_id, change)
        if self._callbacks is not None:
            self._callbacks.timeline_changed(task_id)
        return running

    def _accepted(self, task: GenerationTask) -> None:
        if self._callbacks is not None and task.submission.callback_url is not None:
            self._callbacks.expect(task)

    def authorize(self, request: web.Request) -> None:
        """Accept *request* if it carries the key.

        Raises:
            ApiError: 401.
        """
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("utf-8", "surrogateescape"), self.api_key.encode()
        ):
            raise ApiError(401, "the API key is missing or wrong")


async def serve(emulator: Emulator, *, out: TextIO | None = None) -> None:
    """Print the address and the key on *out* (stdout), and run *emulator* until cancelled.

    Raises:
        OSError: The port is taken.
    """
    out = sys.stdout if out is None else out
    async with emulator:
        print(f"EVOLINK_BASE_URL={emulator.base_url}", file=out)
        print(f"EVOLINK_API_KEY={emulator.api_key}", file=out, flush=True)
        await asyncio.Event().wait()
