"""`Session`: submits generations, watches them, saves their results."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from attrs import NOTHING, NothingType

from evolink_async._callback import (
    Callback,
    CallbackSource,
    check_callback,
    report_registered,
    with_callback,
)
from evolink_async._checks import instance
from evolink_async._clock import Clock, LoopClock, sleep
from evolink_async._http.limiter import Limiter
from evolink_async._http.protocol import CREDITS_PATH, check_idempotency_key, new_idempotency_key
from evolink_async._http.retry import Retries, RetryPolicy, Timeout
from evolink_async._http.submit import BeforeSend, Submitter
from evolink_async._list import list_tasks
from evolink_async._map import Outcome, map_requests
from evolink_async._model.requests import ImageRequest, RawRequest, as_request, check_task_id
from evolink_async._model.snapshots import Credits, GenerationResult, TaskSnapshot, TaskSummary
from evolink_async._polling.policy import PollPolicy
from evolink_async._polling.watch import Watch
from evolink_async._polling.watcher import Watcher
from evolink_async._settings import Settings, read_api_key
from evolink_async._stats import Stats
from evolink_async._task import Task
from evolink_async._text import lines_of
from evolink_async.errors import (
    ConfigurationError,
    EvolinkError,
    InvalidResponseError,
    SessionClosedError,
)

if TYPE_CHECKING:
    import aiohttp

    from evolink_async._http.transport import Answer, Transport
    from evolink_async._results.fetch import ResultClient

__all__ = ["Session", "read_once", "save_result"]

logger = logging.getLogger(__name__)

_LARGEST: Final = {"image": 64 << 20, "audio": 1 << 30, "video": 8 << 30}
"""Bytes one result may have, by the task's type."""

Prompt = str | Mapping[str, Any] | ImageRequest | RawRequest


class Session:
    """A connection to EvoLink that submits generations and watches them all.

    Use it as ``async with Session() as session:``, or close it with `aclose`. It may be
    made anywhere and belongs to the event loop that first uses it.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        max_in_flight: int = 32,
        max_connections: int = 16,
        max_requests_per_second: float | None = None,
        poll: PollPolicy = PollPolicy(),  # noqa: B008 - frozen
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        timeout: Timeout = Timeout(),  # noqa: B008 - frozen
        http: aiohttp.ClientSession | None = None,
        callback: str | CallbackSource | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Prepare a session; nothing is opened or sent yet.

        Args:
            api_key: Key of the API; default the environment's ``EVOLINK_API_KEY``.
            base_url: Origin of the API, https unless it is loopback; default the
                environment's ``EVOLINK_BASE_URL``, else the public one.
            max_in_flight: Generations running at once, however many callers there are.
            max_connections: HTTP requests in flight at once; of four or more, two
                of them are kept for reads.
            max_requests_per_second: Most requests a second, None for no limit.
            poll: When running tasks are polled.
            retry: How failed requests are tried again.
            timeout: How long one HTTP exchange may take.
            http: An aiohttp session to send API requests with, for tracing or special
                connectors; it stays yours to close. Results are never fetched with it.
            callback: ``callback_url`` for every request that has none, or a source that makes
                one for each submit, such as a `webhook.CallbackReceiver`.
            clock: Where the session takes its time from; default the event loop.

        Raises:
            ConfigurationError: A setting is missing or unusable.
        """
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        key = read_api_key(api_key)
        del api_key  # or a report of a later error shows it
        self._settings = Settings(
            api_key=key,
            base_url=base_url,
            max_in_flight=max_in_flight,
            max_connections=max_connections,
            max_requests_per_second=max_requests_per_second,
            poll=poll,
            retry=retry,
            timeout=timeout,
            http=http,
            clock=clock,
        )
        self._callback = check_callback(callback, self)
        self._closed: asyncio.Task[None] | None = None
        # Made by _open, on the loop:
        self._limiter: Limiter
        self._transport: Transport
        self._results: ResultClient
        self._watcher: Watcher
        self._submitter: Submitter

    # -- life ------------------------------------------------------------------------------

    def _open(self) -> None:
        """Bind to the running loop at first use.

        Raises:
            SessionClosedError: It is closed.
            ConfigurationError: It already belongs to another loop.
        """
        if self._closing:
            raise SessionClosedError("the session is closed; make a new one")
        self.check_loop()
        if self._loop is not None:
            return
        # Here, not above: aiohttp takes long to import, and --help needs none of it.
        from evolink_async._http.transport import Transport  # noqa: PLC0415
        from evolink_async._results.fetch import ResultClient  # noqa: PLC0415

        settings = self._settings
        clock, rate, permits = settings.clock, settings.max_requests_per_second, settings.permits()
        limiter = self._limiter = Limiter(clock, permits=permits, rate=rate)
        self._transport = Transport(
            api_key=settings.api_key,
            base_url=settings.base_url,
            clock=clock,
            limiter=limiter,
            timeout=settings.timeout,
            retries=Retries(settings.retry, clock),
            http=settings.http,
        )
        self._results = ResultClient(
            allow_loopback=settings.base_url.startswith("http:"),
            max_connections=settings.max_connections,
            connect_timeout=settings.timeout.connect,
            stall_timeout=settings.timeout.read,
        )
        self._watcher = Watcher(
            self._transport,
            clock=clock,
            policy=settings.poll,
            ready_at=limiter.ready_at,
            max_reads=permits,
            contended=None if rate is None else limiter.is_contended,
            wall=time.time if isinstance(clock, LoopClock) else None,
        )
        self._submitter = Submitter(
            self._transport,
            limiter=limiter,
            clock=clock,
            slots=settings.max_in_flight,
            resend_uncertain=settings.retry.resend_uncertain,
            notice_resume=self._watcher.notice_resume,
        )
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self, *, grace: float | None = None) -> None:
        """Stop watching and close the connections; may be called again.

        No new POST starts. Those in flight are given their time-out, then their callers
        get `SubmitUncertainError`. Callers that wait for a task get `SessionClosedError` with
        its ``task_id``; the ids of what still runs are logged as a warning.

        Args:
            grace: Seconds POSTs in flight are given; None for their own time-out,
                0 to leave at once.
        """
        self._closing = True
        if self._loop is None:
            return
        self._transport.closing = True
        if self._closed is None:
            # A task of its own, so that a cancelled caller leaves nothing half closed.
            self._closed = asyncio.get_running_loop().create_task(self._close(grace))
        try:
            await asyncio.shield(self._closed)
        except asyncio.CancelledError:
            self._submitter.cut_off()
            await asyncio.shield(self._closed)
            raise

    async def _close(self, grace: float | None) -> None:
        try:
            await self._submitter.finish(grace)
        finally:
            running = await self._watcher.stop(
                lambda task_id: SessionClosedError(
                    f"the session was closed while task {task_id} was running; it goes on, "
                    f"and session.task({task_id!r}) of a new session picks it up",
                    task_id=task_id,
                )
            )
            for line in lines_of(running):
                logger.warning("session closed with tasks still running: %s", line)
                await asyncio.sleep(0)
            await self._transport.aclose()
            await self._results.aclose()

    def __del__(self) -> None:
        if getattr(self, "_loop", None) is not None and not self._closing:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self._closing else "open" if self._loop is not None else "not opened"
        running = self._watcher.running if self._loop is not None else 0
        return f"<Session {self.base_url} {state}, {running} running>"

    def __reduce__(self) -> str:
        raise TypeError("a Session cannot be pickled; make one in each process")

    # -- submitting ------------------------------------------------------------------------

    async def submit(
        self,
        request: Prompt,
        /,
        *,
        idempotency_key: str | None = None,
        before_send: BeforeSend | None = None,
        callback: Callback | NothingType = NOTHING,
        **fields: Any,
    ) -> Task:
        """Submit a generation and return its task, once a slot is free and the POST is answered.

        Cancelled before its POST may have left, it sends nothing. After that the POST
        belongs to the session: it is finished, its task watched, and a warning logged.

        Args:
            request: A prompt, a mapping of fields, an `ImageRequest` or a `RawRequest`.
            idempotency_key: Key of an earlier submit to ask for again; default a new one.
            before_send: Awaited with the idempotency key right before each POST; if it raises,
                nothing is sent. It holds a connection meanwhile: it must not wait for other
                requests of this session.
            callback: Replaces the session's *callback* for this submit; None for none.
            **fields: Fields of `ImageRequest`, beside a prompt or mapping.

        Raises:
            RequestValidationError: The request breaks a rule of the API's page.
            SubmitUncertainError: It may have been accepted; nothing was resent.
            SessionClosedError: The session is closed.
            EvolinkError: It was not accepted; the subclass says why.
        """
        given = as_request(request, **fields)
        key = (
            new_idempotency_key()
            if idempotency_key is None
            else check_idempotency_key(idempotency_key)
        )
        source = self._callback if callback is NOTHING else check_callback(callback, self)
        asked = with_callback(given, source, key)
        self._open()
        watch = await self._submitter.submit(
            asked,
            idempotency_key=key,
            before_send=before_send,
            register=partial(self._register, source, asked),
        )
        return Task(watch.id, self, watch)

    def _register(
        self,
        callback: Callback,
        request: ImageRequest | RawRequest,
        snapshot: TaskSnapshot,
        idempotency_key: str,
        answer: Answer,
    ) -> Watch:
        """Watch the task that a submit made."""
        watch = self._watcher.submitted(
            snapshot,
            started=answer.sent_at,
            request=request,
            idempotency_key=idempotency_key,
            on_end=self._submitter.free_slot,
            replayed=answer.is_replayed,
        )
        report_registered(callback, watch.id, request.callback_url)
        return watch

    async def generate(
        self,
        request: Prompt,
        /,
        *,
        idempotency_key: str | None = None,
        before_send: BeforeSend | None = None,
        callback: Callback | NothingType = NOTHING,
        **fields: Any,
    ) -> GenerationResult:
        """Submit a generation and wait for its result; arguments as for `submit`.

        Raises:
            EvolinkError: What `submit` and `Task.wait` raise.
        """
        task = await self.submit(
            request,
            idempotency_key=idempotency_key,
            before_send=before_send,
            callback=callback,
            **fields,
        )
        try:
            return await task
        except asyncio.CancelledError:
            logger.warning("stopped waiting for task %s; it goes on and is watched", task.id)
            raise

    @property
    def callback(self) -> str | CallbackSource | None:
        """The *callback* of the session; may be set at any time."""
        return self._callback

    @callback.setter
    def callback(self, callback: str | CallbackSource | None) -> None:
        self._callback = check_callback(callback, self)

    @property
    def closed(self) -> bool:
        """True from the moment `aclose` was called, or the ``async with`` block was left."""
        return self._closing

    @property
    def unsent(self) -> frozenset[str]:
        """Idempotency keys of the submits that cost nothing yet.

        They wait for a permit, a cool-down or another attempt: no POST was sent, or each was
        surely refused.
        """
        return self._submitter.unsent if self._loop is not None else frozenset()

    @property
    def base_url(self) -> str:
        """Origin of the API."""
        return self._settings.base_url

    def fingerprint(self, salt: bytes) -> bytes:
        """A salted hash of the API key, to compare the keys of two sessions."""
        return self._settings.api_key.fingerprint(salt)

    def check_loop(self) -> None:
        """Check that the running event loop is the session's, if it has one.

        Raises:
            ConfigurationError: Called from elsewhere.
        """
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is not None and here is not self._loop:
            raise ConfigurationError(
                "this session belongs to another event loop; make one session per loop, "
                "or hand the call over with asyncio.run_coroutine_threadsafe"
            )

    @property
    def max_in_flight(self) -> int:
        """Generations running at once."""
        return self._settings.max_in_flight

    @property
    def max_connections(self) -> int:
        """HTTP requests in flight at once."""
        return self._settings.max_connections

    @property
    def clock(self) -> Clock:
        """Where the session takes its time from."""
        return self._settings.clock

    # -- many ------------------------------------------------------------------------------

    def map(
        self, requests: Iterable[Prompt] | AsyncIterable[Prompt]
    ) -> AsyncGenerator[Outcome, None]:
        """Generate many, lazily: outcomes in the order they end.

        Items are pulled only while the next outcome is being waited for, and never more
        than ``max_in_flight`` of them are between input and outcome. Leaving the loop
        stops pulling and submitting; what was submitted goes on, in `tasks`. If you keep
        the iterator in a variable, close it with `contextlib.aclosing`.

        Args:
            requests: Prompts, mappings of fields, or requests; any iterable, also async.

        Raises:
            SessionClosedError: The session was closed.
        """
        return map_requests(self, requests)

    # -- tasks -----------------------------------------------------------------------------

    def task(self, task_id: str) -> Task:
        """A handle on a task by its id, e.g. after a restart. Sends nothing, takes no slot.

        It is watched from the first ``await``, `Task.updates` or `Task.refresh` on. All
        handles of one id share one watch.

        Raises:
            RequestValidationError: *task_id* cannot be one.
        """
        check_task_id(task_id)
        live = self._watcher.find(task_id) if self._loop is not None else None
        return Task(task_id, self, live)

    def nudge(self, task_id: str) -> bool:
        """Poll a watched task now, e.g. because a message reported its end.

        It is polled at once, or ``min_interval`` after its last poll; further nudges before
        that poll change nothing. Returns False, and does nothing, if it is not watched.
        """
        return self._loop is not None and self._watcher.nudge(task_id)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that are watched now, oldest first."""
        if self._loop is None:
            return ()
        return tuple(Task(watch.id, self, watch) for watch in self._watcher.watches)

    def _watcher_here(self) -> Watcher:
        self.check_loop()
        return self._watcher

    def _attach(self, task_id: str) -> Watch:
        self._open()
        return self._watcher.attach(task_id)

    async def list(
        self,
        *,
        status: str | None = None,
        type: str | None = None,  # noqa: A002 - the API's own word
        model: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[TaskSummary, None]:
        """The account's recent tasks, newest first (``GET /v1/tasks``, observed).

        The one way to find a paid task whose id was lost.

        Args:
            status: Only ``processing`` (includes queued), ``completed``, ``failed`` or
                ``cancelled`` ones.
            type: Only this kind of output, e.g. ``image``.
            model: Only this model's.
            limit: At most so many; None for all.

        Raises:
            EvolinkError: The API did not answer as documented.
        """
        self._open()
        filters = {"status": status, "type": type, "model": model}
        async for row in list_tasks(self._transport.get, filters, limit):
            yield row

    async def credits(self) -> Credits:
        """What is left to spend.

        Raises:
            EvolinkError: The API did not answer as documented.
        """
        self._open()
        return Credits.from_json(await self._transport.get(CREDITS_PATH))

    async def download(
        self,
        result: GenerationResult | Task,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        name: str | None = None,
    ) -> tuple[Path, ...]:
        """Save all files of a result as ``<folder>/<task id>-<k>.<ext>``; returns their paths.

        Each is streamed to a temporary name, checked to be the picture it claims to be,
        flushed to disk and renamed. The API key is not sent to the result's host.

        Args:
            result: A result, or a task, which is awaited first.
            folder: Where to save; made if missing.
            overwrite: Whether existing files may be replaced.
            name: What to call the files instead of the task's id; characters that not
                every file system takes are replaced.

        Raises:
            DownloadError: A file could not be saved, e.g. because its link has expired.
            EvolinkError: The task did not complete.
        """
        self._open()
        if isinstance(result, Task):
            result = await result
        instance("result", result, GenerationResult)
        return await save_result(self, result, Path(folder), stem=name, overwrite=overwrite)

    @property
    def stats(self) -> Stats:
        """What the session is doing and has done so far."""
        if self._loop is None:
            return Stats()
        transport = self._transport
        return Stats(
            running=self._watcher.running,
            waiting=self._submitter.waiting,
            submits=transport.submits,
            reads=transport.reads,
            ids_read=transport.ids_read,
            retries=transport.retries.count,
            cool_downs=self._limiter.cool_downs,
            cooling_down=self._limiter.cooling_down,
            typical=self._watcher.typical,
        )


async def save_result(
    session: Session, result: GenerationResult, folder: Path, **how: Any
) -> tuple[Path, ...]:
    """`Session.download`, with every option of `Saving`."""
    from evolink_async._results.save import Saving  # noqa: PLC0415 - see _open

    session._open()
    saving = Saving(
        open_result=session._results.open,
        folder=folder,
        task_id=result.task_id,
        **how,
        max_bytes=_LARGEST.get(result.snapshot.type or "", _LARGEST["image"]),
        attempts=session._settings.retry.attempts,
        wait_after=session._settings.retry.wait_after,
        sleep=partial(sleep, session.clock),
    )
    return await saving.save_all(result.urls)


async def read_once(session: Session, task_id: str) -> TaskSnapshot:
    """Poll a task once without watching it.

    Raises:
        EvolinkError: The read failed.
    """
    session._open()
    answer = (await session._transport.fetch((task_id,))).answers[task_id]
    if isinstance(answer, EvolinkError):
        raise answer
    if answer is None:
        raise InvalidResponseError(f"the answer does not name task {task_id}")
    return answer
