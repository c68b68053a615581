"""`Session`: submits generations, watches them, saves their results."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Iterable,
    Mapping,
)
from contextvars import Context, copy_context
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from attrs import NOTHING, NothingType, evolve, field, frozen

from evolink_async import _clock as clocks
from evolink_async._checks import instance, number, refuse, whole
from evolink_async._clock import Clock, LoopClock
from evolink_async._hosts import check_base_url, check_callback_url, shown_url
from evolink_async._http.limiter import NOT_SENT, Gate
from evolink_async._http.protocol import (
    CREDITS_PATH,
    TASKS_PATH,
    check_idempotency_key,
    new_idempotency_key,
)
from evolink_async._http.retry import RetryPolicy, Timeout
from evolink_async._http.secret import Secret
from evolink_async._http.submit import BeforeSend, Submission
from evolink_async._map import Outcome, map_requests
from evolink_async._model.requests import ImageRequest, RawRequest, as_request, check_task_id
from evolink_async._model.snapshots import (
    Credits,
    GenerationResult,
    TaskSnapshot,
    TaskSummary,
)
from evolink_async._polling.policy import PollPolicy
from evolink_async._polling.watch import Watch
from evolink_async._polling.watcher import Watcher
from evolink_async._task import Home, Task
from evolink_async._text import lines_of
from evolink_async.errors import (
    ConfigurationError,
    EvolinkError,
    InvalidResponseError,
    SessionClosedError,
)

if TYPE_CHECKING:
    import aiohttp

    from evolink_async._http.transport import Transport
    from evolink_async._results.fetch import ResultClient

__all__ = ["CallbackSource", "Session", "Stats"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_BASE_URL: Final = "https://api.evolink.ai"
_PAGE: Final = 50
_LARGEST: Final = {"image": 64 << 20, "audio": 1 << 30, "video": 8 << 30}
"""Bytes one result may have, by the task's type."""

Prompt = str | Mapping[str, Any] | ImageRequest | RawRequest


class CallbackSource(Protocol):
    """What makes a callback URL for each submit, such as a `webhook.CallbackReceiver`."""

    def url_for(self, idempotency_key: str) -> str:
        """The ``callback_url`` of the submit with that key."""
        ...

    def registered(self, task_id: str, callback_url: str) -> None:
        """The submit with that ``callback_url`` was answered, and its task is watched."""
        ...


Callback = str | CallbackSource | None


def _read_only(values: Mapping[str, float]) -> Mapping[str, float]:
    return MappingProxyType(dict(values))


@frozen(kw_only=True)
class Stats:
    """What a session is doing and has done so far.

    Attributes:
        running: Tasks watched now.
        waiting: Submits waiting for a slot.
        submits: POSTs of generations sent, resends included.
        reads: Requests that read something.
        ids_read: Tasks those reads asked for.
        retries: Submits and single calls tried again.
        cool_downs: Times the API asked the session for patience.
        cooling_down: Seconds until it may ask again, 0 if it may now.
        typical: Learned median duration of a generation in seconds, by endpoint and model,
            e.g. ``"/v1/images/generations wan2.5-text-to-image"``.
    """

    running: int = 0
    waiting: int = 0
    submits: int = 0
    reads: int = 0
    ids_read: int = 0
    retries: int = 0
    cool_downs: int = 0
    cooling_down: float = 0.0
    typical: Mapping[str, float] = field(factory=dict, converter=_read_only, hash=False)


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
            max_in_flight: Generations running at once, whoever asks for them.
            max_connections: HTTP requests in the air at once; of four or more, two
                seats are kept for reads.
            max_requests_per_second: Most requests a second, None for no limit.
            poll: When running tasks are looked at.
            retry: How failed requests are tried again.
            timeout: How long one HTTP exchange may take.
            http: An aiohttp session to send API requests with, for tracing or special
                connectors; it stays yours to close. Results are never fetched with it.
            callback: ``callback_url`` for every request that has none, or what makes one
                for each submit, such as a `webhook.CallbackReceiver`.
            clock: Where the session takes its time from; default the event loop.

        Raises:
            ConfigurationError: A setting is missing or unusable.
        """
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._base_url = ""
        self._key = Secret(_api_key(api_key))
        del api_key  # or a report of a later error shows it
        self._base_url = _base_url(base_url)
        self._max_in_flight = whole("max_in_flight", max_in_flight)
        self._max_connections = whole("max_connections", max_connections)
        self._rate = (
            None
            if max_requests_per_second is None
            else number("max_requests_per_second", max_requests_per_second, above=True)
        )
        self._poll = instance("poll", poll, PollPolicy)
        self._retry = instance("retry", retry, RetryPolicy)
        self._timeout = instance("timeout", timeout, Timeout)
        self._http = http
        self._callback = _callback(callback, self)
        self._clock: Clock = clocks.default() if clock is None else clock
        self._slots = asyncio.Semaphore(self._max_in_flight)
        self._release = self._slots.release  # one bound method for all watches
        self._home: weakref.ref[Home] | None = None  # weak: it holds the session
        self._waiting = 0
        # Submits that wait for their first seat, and those that have had one.
        self._queued: set[Submission] = set()
        self._posts: dict[asyncio.Task[Watch], Submission] = {}
        self._closed: asyncio.Task[None] | None = None
        # Made by _open, on the loop:
        self._gate: Gate
        self._transport: Transport
        self._results: ResultClient
        self._watcher: Watcher

    # -- life ------------------------------------------------------------------------------

    def _open(self) -> None:
        """Bind to the running loop at first use.

        Raises:
            SessionClosedError: It is closed.
            ConfigurationError: It already belongs to another loop.
        """
        loop = asyncio.get_running_loop()
        if self._closing:
            raise SessionClosedError("the session is closed; make a new one")
        if self._loop is loop:
            return
        if self._loop is not None:
            raise ConfigurationError(
                "this session belongs to another event loop; make one session per loop"
            )
        # Here, not above: aiohttp takes long to import, and --help needs none of it.
        from evolink_async._http.transport import Transport  # noqa: PLC0415
        from evolink_async._results.fetch import ResultClient  # noqa: PLC0415

        seats = _pool_limit(self._http, self._max_connections)
        self._gate = Gate(self._clock, seats=seats, rate=self._rate)
        self._transport = Transport(
            api_key=self._key,
            base_url=self._base_url,
            clock=self._clock,
            gate=self._gate,
            timeout=self._timeout,
            policy=self._retry,
            http=self._http,
            user_agent=f"evolink-async/{version('evolink-async')}",
        )
        self._results = ResultClient(
            allow_loopback=self._base_url.startswith("http:"),
            max_connections=self._max_connections,
            connect_timeout=self._timeout.connect,
            stall_timeout=self._timeout.read,
        )
        self._watcher = Watcher(
            self._transport,
            clock=self._clock,
            policy=self._poll,
            ready_at=self._gate.ready_at,
            max_reads=seats,
            contended=None if self._rate is None else lambda: self._gate.is_contended,
            wall=time.time if isinstance(self._clock, LoopClock) else None,
        )
        self._loop = loop

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self, *, grace: float | None = None) -> None:
        """Stop watching and close the connections; may be called again.

        No new POST starts. Those in the air are given their time-out, then their callers
        get `SubmitUncertainError`. Whoever waits for a task gets `SessionClosedError` with
        its ``task_id``; the ids of what still runs are logged as a warning.

        Args:
            grace: Seconds POSTs in the air are given; None for their own time-out,
                0 to leave at once.
        """
        self._closing = True
        if self._loop is None:
            return
        self._transport.closing = True
        if self._closed is None:
            # A task of its own: who is cancelled while closing leaves nothing half closed.
            self._closed = asyncio.get_running_loop().create_task(self._close(grace))
        try:
            await asyncio.shield(self._closed)
        except asyncio.CancelledError:
            for post in self._posts:
                post.cancel()  # their answers are not waited for any longer
            await asyncio.shield(self._closed)
            raise

    async def _close(self, grace: float | None) -> None:
        try:
            await self._finish_posts(grace)
        finally:
            left = tuple(self._posts)  # none, unless we were cancelled meanwhile
            for post in left:
                post.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await self._shut()

    async def _finish_posts(self, grace: float | None) -> None:
        for _ in range(self._waiting):  # they wake, see that we are closing, and say so
            self._slots.release()
        self._gate.turn_away()
        for post, submission in self._posts.items():
            if not submission.sending:
                post.cancel()
        if self._posts:
            _, late = await asyncio.wait(tuple(self._posts), timeout=grace)
            for post in late:
                post.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _shut(self) -> None:
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
        return f"<Session {self._base_url} {state}, {running} running>"

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
            before_send: Awaited with the idempotency key when nothing is left to wait for,
                right before each POST; if it raises, nothing is sent. It holds a connection:
                it must not wait for other requests of this session.
            callback: What gives a request without ``callback_url`` one, as for the session;
                None for nothing. Default the session's.
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
        source = self._callback if callback is NOTHING else _callback(callback, self)
        asked = _with_callback(given, source, key)
        self._open()
        await self._take_slot()
        watch = await self._post(asked, key, before_send, source)
        return self._handle(watch.id, watch)

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
        """What gives each request without ``callback_url`` one; may be set at any time."""
        return self._callback

    @callback.setter
    def callback(self, callback: str | CallbackSource | None) -> None:
        self._callback = _callback(callback, self)

    async def _take_slot(self) -> None:
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        if self._closing:
            raise SessionClosedError(NOT_SENT)

    async def _post(
        self,
        request: ImageRequest | RawRequest,
        key: str,
        before_send: BeforeSend | None,
        callback: Callback,
    ) -> Watch:
        """Run one POST in an asyncio task of the session's own; holds a slot, gives it on."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Watch] = loop.create_future()
        submission = Submission(
            request, idempotency_key=key, before_send=before_send, answer=answer
        )
        self._queued.add(submission)
        begin = partial(self._begin, submission, callback, loop, copy_context())
        try:
            self._gate.queue(answer, begin, submit=True)
            return await answer
        except BaseException as exc:
            answer.cancel()  # if it is there already, its being unread is nothing to log
            post = submission.post
            if post is None:
                self._queued.discard(submission)
                self._slots.release()
            elif post in self._posts:  # and will say what became of it
                if not submission.in_air:
                    submission.abandoned = True
                    post.cancel()
            elif isinstance(exc, asyncio.CancelledError):
                _log_orphan(post, submission)
            raise

    def _begin(
        self,
        submission: Submission,
        callback: Callback,
        loop: asyncio.AbstractEventLoop,
        context: Context,
    ) -> None:
        """Send a submission that has a seat, in the context of its caller."""
        self._queued.discard(submission)
        submission.seated = True
        posting = self._submit_and_watch(submission, callback)
        try:  # in its context, but without telling a task factory of the caller's, which may refuse
            self._watcher.notice_resume()  # it must not go out on a connection that is dead
            post = context.run(loop.create_task, posting)
        except Exception as exc:  # noqa: BLE001 - such a factory may raise anything
            posting.close()
            submission.seated = False
            submission.answer.set_exception(exc)
            self._gate.decline(submit=True)
            return
        submission.post = post
        self._posts[post] = submission
        post.add_done_callback(self._post_ended)

    async def _submit_and_watch(self, submission: Submission, callback: Callback) -> Watch:
        try:
            snapshot = await self._transport.submit(submission)
        except asyncio.CancelledError:
            if not submission.in_air:
                raise
            logger.warning(
                "cut off in the middle of a submit, which may have been accepted: "
                "idempotency key %s",
                submission.idempotency_key,
            )
            raise submission.uncertain("it was cut off") from None
        watch = self._watcher.submitted(
            snapshot,
            started=submission.sent_at,
            request=submission.request,
            idempotency_key=submission.idempotency_key,
            on_end=self._release,
            replayed=submission.replayed,
        )
        if not (callback is None or isinstance(callback, str)):
            _tell(callback, watch)
        return watch

    def _post_ended(self, post: asyncio.Task[Watch]) -> None:
        """Tell its caller; give slot and seat back (also if the task never started)."""
        submission = self._posts.pop(post)
        answer = submission.answer
        if submission.seated:
            self._gate.decline(submit=True)
        error = SessionClosedError(NOT_SENT) if post.cancelled() else post.exception()
        if error is not None:
            self._slots.release()
        if answer.done():
            _log_orphan(post, submission)
        elif error is None:
            answer.set_result(post.result())
        elif self._closing or not post.cancelled():
            answer.set_exception(error)
        else:
            answer.cancel()

    @property
    def closed(self) -> bool:
        """True from the moment `aclose` was called, or the ``async with`` block was left."""
        return self._closing

    @property
    def unsent(self) -> frozenset[str]:
        """Idempotency keys of the submits that cost nothing yet.

        They wait for a seat, a cool-down or another attempt: no POST of theirs has left, or
        each that has was surely refused.
        """
        submissions = self._queued.union(self._posts.values())
        in_air = {each.idempotency_key for each in submissions if each.in_air}
        return frozenset(each.idempotency_key for each in submissions) - in_air

    @property
    def base_url(self) -> str:
        """Origin of the API."""
        return self._base_url

    def fingerprint(self, salt: bytes) -> bytes:
        """A salted hash of the API key: tells whether two sessions have the same, no more."""
        return self._key.fingerprint(salt)

    def check_loop(self) -> None:
        """Refuse to be touched from another event loop or thread than the session's own.

        Raises:
            ConfigurationError: Called from elsewhere.
        """
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is not None and here is not self._loop:
            raise ConfigurationError(
                "this session belongs to another event loop; hand the call over to that loop, "
                "e.g. with asyncio.run_coroutine_threadsafe"
            )

    @property
    def max_in_flight(self) -> int:
        """Generations running at once."""
        return self._max_in_flight

    @property
    def max_connections(self) -> int:
        """HTTP requests in the air at once."""
        return self._max_connections

    @property
    def clock(self) -> Clock:
        """Where the session takes its time from."""
        return self._clock

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
        return self._handle(task_id, live)

    def nudge(self, task_id: str) -> bool:
        """Look at a watched task now, because something else told that it has ended.

        It is read at once, or its ``min_interval`` after its last read; nudges that come
        before that read are one. Returns False, and does nothing, if it is not watched.
        """
        return self._loop is not None and self._watcher.nudge(task_id)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that are watched now, oldest first."""
        if self._loop is None:
            return ()
        return tuple(self._handle(watch.id, watch) for watch in self._watcher.watches)

    def _handle(self, task_id: str, watch: Watch | None) -> Task:
        home = None if self._home is None else self._home()
        if home is None:
            home = Home(
                attach=self._attach,
                watcher=self._watcher_here,
                clock=self._clock,
                save=self.download,
            )
            self._home = weakref.ref(home)
        return Task(task_id, home, watch)

    def _watcher_here(self) -> Watcher:
        if self._loop is not asyncio.get_running_loop():
            raise ConfigurationError(
                "this task's session belongs to another event loop; "
                "make a session here and pick it up by its id: session.task(id)"
            )
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
        if limit is not None:
            whole("limit", limit)
        given = {"status": status, "type": type, "model": model}
        filters = {name: value for name, value in given.items() if value is not None}
        seen: set[str] = set()
        page = walked = 0
        while limit is None or len(seen) < limit:
            page += 1
            paging = {"page": str(page), "page_size": str(_PAGE)}
            rows, count, total = _rows(await self._transport.get(TASKS_PATH, filters | paging))
            fresh = [row for row in rows if row.id not in seen]  # new tasks shift the pages
            for row in fresh[: None if limit is None else limit - len(seen)]:
                seen.add(row.id)
                yield row
            walked += count
            if not count or walked >= total:
                return

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

    async def _sleep(self, seconds: float) -> None:
        await self._clock.sleep_until(self._clock.now() + seconds)

    @property
    def stats(self) -> Stats:
        """What the session is doing and has done so far."""
        if self._loop is None:
            return Stats()
        counters = self._transport.counters
        return Stats(
            running=self._watcher.running,
            waiting=self._waiting,
            submits=counters.submits,
            reads=counters.reads,
            ids_read=counters.ids_read,
            retries=counters.retries,
            cool_downs=self._gate.cool_downs,
            cooling_down=max(0.0, self._gate.closed_until - self._clock.now()),
            typical=self._watcher.typical,
        )


async def save_result(
    session: Session, result: GenerationResult, folder: Path, **how: Any
) -> tuple[Path, ...]:
    """`Session.download`, with all that `save_all` can be told."""
    from evolink_async._results.save import save_all  # noqa: PLC0415 - see _open

    session._open()
    return await save_all(
        session._results.open,
        result.urls,
        folder,
        task_id=result.task_id,
        **how,
        max_bytes=_LARGEST.get(result.snapshot.type or "", _LARGEST["image"]),
        attempts=session._retry.attempts,
        wait_after=session._retry.wait_after,
        sleep=session._sleep,
    )


async def read_once(session: Session, task_id: str) -> TaskSnapshot:
    """One read of a task that nobody watches.

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


def _with_callback(
    request: ImageRequest | RawRequest, callback: Callback, key: str
) -> ImageRequest | RawRequest:
    """*request* with a callback URL; it keeps the first key's where a new one is minted."""
    if callback is None or request.callback_url is not None:
        return request
    url = callback if isinstance(callback, str) else callback.url_for(key)
    if isinstance(request, RawRequest):
        return RawRequest(request.path, body={**request.body(), "callback_url": url})
    return evolve(request, callback_url=url)


def _tell(callback: CallbackSource, watch: Watch) -> None:
    """Tell who made the callback URL which task it is about."""
    url = watch.request.callback_url if watch.request is not None else None
    try:
        if url is not None:
            callback.registered(watch.id, url)
    except Exception:  # other people's code must not lose a paid task
        logger.exception("callback=%r failed to register task %s", type(callback), watch.id)


def _log_orphan(post: asyncio.Task[Watch], submission: Submission) -> None:
    """Say what became of a POST whose caller was cancelled."""
    key = submission.idempotency_key
    if post.cancelled():
        return
    if (error := post.exception()) is not None:
        logger.warning("a submit whose caller was cancelled failed (key %s): %s", key, error)
    else:
        logger.warning(
            "a submit whose caller was cancelled made task %s (key %s); it is being watched",
            post.result().id,
            key,
        )


def _rows(answer: Any) -> tuple[list[TaskSummary], int, int]:
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise InvalidResponseError("the task list has no list named data")
    total = answer.get("total")
    rows = []
    for row in data:
        try:
            rows.append(TaskSummary.from_json(row))
        except InvalidResponseError as exc:  # the others may be what somebody is looking for
            logger.warning("a row of the task list was left out: %s", exc)
    return rows, len(data), total if isinstance(total, int) else 10**9


# -- settings ----------------------------------------------------------------------------------


def _api_key(given: str | None) -> str:
    key = os.environ.get("EVOLINK_API_KEY", "") if given is None else given
    if not isinstance(key, str) or not key.strip():
        raise ConfigurationError(
            "no API key is given",
            field="api_key",
            way_past="api_key",
            advice="pass Session(api_key=...) or set EVOLINK_API_KEY; keys are made at "
            "https://evolink.ai/dashboard/keys",
        )
    key = key.strip()
    if not all("!" <= c <= "~" for c in key):
        raise ConfigurationError("the API key has characters that no key has; copy it again")
    return key


def _base_url(given: str | None) -> str:
    url = given or os.environ.get("EVOLINK_BASE_URL") or DEFAULT_BASE_URL
    try:
        return check_base_url(url)
    except ValueError as exc:
        allowed = "an https address such as https://api.evolink.ai, or http on this machine"
        raise refuse("base_url", shown_url(url), allowed, exc) from None


def _callback(callback: Callback, session: Session) -> Callback:
    if callback is None:
        return None
    allowed = "an https address, a CallbackReceiver of this session or None"
    reason = None
    if isinstance(callback, str):
        reason = check_callback_url(callback)
    elif isinstance(callback, type) or not (
        hasattr(callback, "url_for") and hasattr(callback, "registered")
    ):
        reason = "it makes no addresses"
    elif getattr(callback, "session", session) is not session:
        reason = "it belongs to another session, which would look for the tasks in vain"
    if reason is not None:
        raise refuse("callback", callback, allowed, reason)
    return callback


def _pool_limit(http: aiohttp.ClientSession | None, seats: int) -> int:
    """Never more seats than a connector handed in has connections: its pool must not queue."""
    connector = http.connector if http is not None else None
    if connector is None:
        return seats
    limits = [limit for limit in (connector.limit, connector.limit_per_host) if limit > 0]
    return min([seats, *limits])
