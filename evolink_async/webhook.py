"""Callbacks: the API reports the end of a task, so that nobody has to poll for it.

::

    session = Session()
    receiver = CallbackReceiver(
        session, public_url="https://app.example.com/hooks/evolink", secret=SECRET
    )
    app.router.add_route("*", "/hooks/evolink/{token}", receiver.aiohttp_handler)  # aiohttp.web
    app.mount("/hooks/evolink", receiver.asgi)                     # FastAPI, Starlette, any ASGI
    status = await receiver.deliver(path, body)                    # anything else

The API's page documents no signature, so a callback is only a hint: it makes the session poll
its task now, and the poll alone decides what the task is. Each submit gets a ``callback_url``
of its own, which ends in ``<idempotency key>.<HMAC of it>``; a request to any other path is
refused before its body is read. Anyone with that path can have its task polled, so keep it out
of access logs: ``access_log=None`` in aiohttp.web, ``access_log=False`` in uvicorn.

A service with several replicas gives them one secret and a message bus: a replica publishes the
id of each task that is not watched there (``on_unwatched``), and each replica calls `nudge` with
the ids it receives.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
import json
import logging
import re
import secrets
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import astuple, evolve, frozen

from evolink_async._checks import instance, refuse
from evolink_async._hosts import check_callback_url, shown_url
from evolink_async._http.secret import Secret
from evolink_async._model.requests import check_task_id
from evolink_async._session import Session
from evolink_async.errors import ConfigurationError, EvolinkError, RequestValidationError

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["CallbackReceiver", "CallbackStats"]

logger = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")
_Bytes = bytes | bytearray | memoryview
OnUnwatched = Callable[[str], object]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_MAX_BODY: Final = 256 * 1024
"""Bytes of one delivery; a task object has a few kilobytes."""
_BODY_SECONDS: Final = 10.0
"""Real seconds one delivery may take to arrive; its sender gives up then (API page, callbacks)."""
_MAX_EARLY: Final = 10_000
"""URLs with deliveries about unwatched tasks that are remembered."""
_EARLY_SECONDS: Final = 600.0
"""How long they are remembered."""
_IDS_PER_URL: Final = 4
"""Unwatched ids accepted on one URL: the first may be forged by someone who found the URL."""
_MAX_OWN: Final = 100_000
"""Newest URLs of this session's tasks that are remembered; each takes some 140 bytes."""
_TOKEN: Final = re.compile(r"([A-Za-z0-9._-]{16,96})\.([A-Za-z0-9_-]{43})")
"""Last segment of a callback URL: an idempotency key and its HMAC."""
_MAX_TOKEN: Final = 96 + 1 + 43
_STATUSES: Final = {
    "forged": 404,
    "malformed": 400,
    "too_large": 413,
    "too_slow": 408,
    "compressed": 415,
    "wrong_method": 405,
    "closed": 503,
}
"""What a refused delivery is answered with, by the counter of `CallbackStats` it goes into."""


@frozen(kw_only=True)
class CallbackStats:
    """Deliveries so far by outcome; each is counted once.

    Attributes:
        nudged: About a watched task, which is polled now, or its shortest interval after its
            last poll.
        early: About a task that is not watched here; remembered for 10 minutes, because the
            answer to its submit may still be on its way.
        late: Repeats, and deliveries about tasks that had ended; they cost no poll.
        forged: To a path this receiver did not make, or with the id of another task.
        malformed: With a body that was cut off, not JSON, or without a task id.
        too_large: With a body above 256 KiB.
        too_slow: With a body that took longer than its sender waits (10 s).
        compressed: With a compressed body, which is not unpacked.
        wrong_method: Not POSTs.
        closed: After the session was closed; the sender is asked to try again.
    """

    nudged: int = 0
    early: int = 0
    late: int = 0
    forged: int = 0
    malformed: int = 0
    too_large: int = 0
    too_slow: int = 0
    compressed: int = 0
    wrong_method: int = 0
    closed: int = 0

    @property
    def received(self) -> int:
        """All deliveries."""
        return sum(astuple(self))


class CallbackReceiver:
    """Receives a session's callbacks, in the session's event loop.

    It becomes the session's ``callback``, so that every submit asks for a callback; with
    ``default=False`` only submits with ``callback=receiver`` do.
    """

    def __init__(
        self,
        session: Session,
        *,
        public_url: str,
        secret: str | _Bytes | None = None,
        on_unwatched: OnUnwatched | None = None,
        default: bool = True,
    ) -> None:
        """Prepare to receive; nothing is opened or sent.

        Args:
            session: The session that submits and watches the tasks.
            public_url: Where the API reaches this receiver: https on a public host. A path
                segment of at most 140 characters is added.
            secret: Key of the HMAC in the paths, at least 16 bytes. Give all replicas the same
                one, and keep it over restarts. None for a new one: earlier paths are then
                unknown, and a submit repeated with its idempotency key asks for another
                ``callback_url``, which the gateway refuses (409, ``idempotency_conflict``).
            on_unwatched: Called with the id of a delivered task that is not watched here, and
                awaited if it returns an awaitable, before the delivery is answered. Called once
                per id, and for at most 4 ids per ``callback_url``. Publish the id for other
                replicas to `nudge`. An error it raises goes to the web server.
            default: Whether all submits of the session ask for callbacks.

        Raises:
            ConfigurationError: A setting cannot be used.
        """
        self._public_url = ""
        self._stats = CallbackStats()
        self._secret, reason = _secret(secret)
        del secret  # or a report of a later error shows it
        if reason is not None:
            raise ConfigurationError(reason)
        self._session = instance("session", session, Session)
        self._public_url = _public_url(public_url)
        if on_unwatched is not None and not callable(on_unwatched):
            raise refuse("on_unwatched", on_unwatched, "a function of a task's id, or None")
        self._on_unwatched = on_unwatched
        # Ids of unwatched tasks by the token they came with, and until when they count.
        self._early: OrderedDict[str, tuple[float, tuple[str, ...]]] = OrderedDict()
        # Hashes of the newest tokens of this session's tasks, however old: a task may run for
        # an hour and its callback come later still.
        self._own: OrderedDict[int, None] = OrderedDict()
        if default:
            session.callback = self

    def __repr__(self) -> str:
        return f"<CallbackReceiver {self._public_url}, {self._stats.received} received>"

    @property
    def session(self) -> Session:
        """The session that submits and watches the tasks."""
        return self._session

    @property
    def stats(self) -> CallbackStats:
        """Deliveries so far, by outcome."""
        return self._stats

    # -- called by the session -------------------------------------------------------------

    def url_for(self, idempotency_key: str) -> str:
        """The ``callback_url`` of the submit with that key; the same secret makes the same URL."""
        return f"{self._public_url}/{idempotency_key}.{self._signature(idempotency_key)}"

    def registered(self, task_id: str, callback_url: str) -> None:
        """The submit with *callback_url* was answered; *task_id* is watched from now on."""
        token = callback_url.rpartition("/")[2]
        self._add_own(token)
        if self._early_ids(token):
            self._session.nudge(task_id)

    # -- deliveries ------------------------------------------------------------------------

    async def deliver(self, path: str, body: _Bytes) -> int:
        """Handle the delivery that was POSTed to *path*; returns the status to answer with.

        Args:
            path: Path of the request's URL. Only its last segment counts; a query is ignored.
            body: Body of the request, not compressed. Do not read more than 256 KiB of it.

        Returns:
            204 if it was accepted; 400 for a body that is no task, 404 for a path not made
            here (also with a slash after it), 413 for a body above 256 KiB, 503 once the
            session is closed.

        Raises:
            ConfigurationError: *path* is not a string, *body* not bytes, or this is not
                the event loop of the session.
        """
        if not isinstance(path, str) or not isinstance(body, _Bytes):
            raise ConfigurationError(
                f"deliver({type(path).__name__}, {type(body).__name__}) is not allowed: "
                "give the path as str and the body as bytes"
            )
        self._session.check_loop()
        try:
            return await self._accept(self._check_path(path.partition("?")[0]), bytes(body))
        except _RefusedError as refused:
            return refused.status

    def nudge(self, task_id: str) -> bool:
        """Poll a task now, because another replica got its callback.

        Returns whether the task is watched here; if not, nothing is done.

        Raises:
            RequestValidationError: *task_id* cannot be one.
            ConfigurationError: This is not the event loop of the session.
        """
        self._session.check_loop()
        return self._session.nudge(check_task_id(task_id))

    async def aiohttp_handler(self, request: web.Request) -> web.Response:
        """Answer a request to an ``aiohttp.web`` application.

        Add it as ``add_route("*", "/hooks/evolink/{token}", receiver.aiohttp_handler)``.
        """
        from aiohttp import web  # noqa: PLC0415 - loaded only where aiohttp.web is used

        encoding = request.headers.get("Content-Encoding", "")
        status = await self._receive(
            request.method, request.path, encoding, request.content_length, _aiohttp_chunks(request)
        )
        response = web.Response(status=status, headers=_headers(status))
        if status != 204 and not request.content.is_eof():
            # Otherwise the server reads, and unpacks, the rest of the body for a while.
            response.force_close()
            with suppress(ConnectionError):  # the sender may have disconnected
                await response.prepare(request)
                await response.write_eof()
            request.protocol.force_close()
        return response

    @property
    def asgi(self) -> Callable[[_Message, _Receive, _Send], Awaitable[None]]:
        """An ASGI application: mount it, e.g. ``app.mount("/hooks/evolink", receiver.asgi)``."""

        # Not a method, because servers mistake a bound one for ASGI 2.
        async def application(scope: _Message, receive: _Receive, send: _Send) -> None:
            await self._answer(scope, receive, send)

        return application

    async def _answer(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            # Some servers require that their start and stop are acknowledged.
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = dict(scope["headers"])
            status = await self._receive(
                scope["method"],
                scope["path"],
                headers.get(b"content-encoding", b"").decode("latin-1"),
                _length(headers.get(b"content-length", b"")),
                _asgi_chunks(receive),
            )
            closes = status != 204 and str(scope.get("http_version", "1.1")).startswith("1")
            answer = _headers(status) | ({"Connection": "close"} if closes else {})
            lines = [(name.lower().encode(), value.encode()) for name, value in answer.items()]
            await send({"type": "http.response.start", "status": status, "headers": lines})
            await send({"type": "http.response.body", "body": b""})

    async def _receive(
        self,
        method: str,
        path: str,
        encoding: str,
        length: int | None,
        chunks: AsyncIterator[bytes],
    ) -> int:
        """Handle a delivery while it arrives, reading as little of it as possible."""
        self._session.check_loop()
        try:
            if method != "POST":
                raise self._refuse("wrong_method")
            token = self._check_path(path)
            if encoding.strip().lower() not in {"", "identity"}:
                raise self._refuse("compressed")
            if length is not None and length > _MAX_BODY:
                raise self._refuse("too_large")
            return await self._accept(token, await self._read(chunks))
        except _RefusedError as refused:
            return refused.status

    async def _read(self, chunks: AsyncIterator[bytes]) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in chunks:
                    body += chunk
                    if len(body) > _MAX_BODY:
                        raise self._refuse("too_large")
        except TimeoutError:
            raise self._refuse("too_slow") from None
        except ConnectionError:
            raise self._refuse("malformed") from None
        return bytes(body)

    def _check_path(self, path: str) -> str:
        """The token at the end of *path*, if this receiver signed it."""
        token = path.rpartition("/")[2]
        match = _TOKEN.fullmatch(token) if len(token) <= _MAX_TOKEN else None
        if match is None or not hmac.compare_digest(self._signature(match[1]), match[2]):
            raise self._refuse("forged")
        if self._session.closed:
            raise self._refuse("closed")
        return token

    async def _accept(self, token: str, body: bytes) -> int:
        """Nudge the task a delivery is about, or remember its id; returns the status."""
        task_id = self._task_id(body)
        request = self._session.task(task_id).request
        url = request.callback_url if request is not None else None
        if request is not None and (url or "").rpartition("/")[2] != token:
            raise self._refuse("forged")
        early = self._early_ids(token)
        if self._session.nudge(task_id):
            self._add_own(token)
            self._count("nudged")
        elif hash(token) in self._own or task_id in early:
            self._count("late")
        elif len(early) >= _IDS_PER_URL:
            raise self._refuse("forged")
        else:
            until = self._session.clock.now() + _EARLY_SECONDS
            _put(self._early, token, (until, (*early, task_id)), most=_MAX_EARLY)
            self._count("early")
            logger.debug("a callback for task %s, which is not watched here", task_id)
            try:
                await self._publish(task_id)
            except BaseException:  # the sender delivers again, and then it is published
                left = tuple(each for each in self._early_ids(token) if each != task_id)
                _put(self._early, token, (until, left), most=_MAX_EARLY)
                raise
        return 204

    async def _publish(self, task_id: str) -> None:
        if self._on_unwatched is not None:
            returned = self._on_unwatched(task_id)
            if inspect.isawaitable(returned):
                await returned

    def _add_own(self, token: str) -> None:
        _put(self._own, hash(token), None, most=_MAX_OWN)

    def _early_ids(self, token: str) -> tuple[str, ...]:
        """The ids of unwatched tasks that came with *token* in the last 10 minutes."""
        until, ids = self._early.get(token, (0.0, ()))
        return ids if self._session.clock.now() < until else ()

    def _task_id(self, body: bytes) -> str:
        if len(body) > _MAX_BODY:
            raise self._refuse("too_large")
        try:
            task = json.loads(body)
            return check_task_id(task.get("id") if isinstance(task, dict) else None)
        except (ValueError, RecursionError, RequestValidationError):
            raise self._refuse("malformed") from None

    def _signature(self, key: str) -> str:
        message = b"evolink-async callback\0" + key.encode()
        digest = hmac.digest(self._secret.reveal().encode("latin-1"), message, sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()

    def _refuse(self, reason: str) -> _RefusedError:
        self._count(reason)
        return _RefusedError(_STATUSES[reason])

    def _count(self, name: str) -> None:
        self._stats = evolve(self._stats, **{name: getattr(self._stats, name) + 1})


class _RefusedError(EvolinkError):
    """A delivery that is refused, with the status to answer with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"refused with {status}")
        self.status = status


def _put(entries: OrderedDict[K, V], key: K, value: V, *, most: int) -> None:
    """Set the newest of *entries*; drops the oldest if there are more than *most*."""
    entries[key] = value
    entries.move_to_end(key)
    if len(entries) > most:
        entries.popitem(last=False)


# -- settings ----------------------------------------------------------------------------------


def _public_url(url: str) -> str:
    allowed = (
        "the https address on a public host at which the API reaches this service, such as "
        "'https://app.example.com/hooks/evolink'"
    )
    if not isinstance(url, str):
        raise refuse("public_url", url, allowed)
    base = url.rstrip("/")
    reason = check_callback_url(f"{base}/{'k' * _MAX_TOKEN}")
    if reason is None and ("?" in base or "#" in base):
        reason = "it has a query or a fragment"
    if reason is not None:
        raise refuse("public_url", shown_url(url), allowed, reason)
    return base


def _secret(given: object) -> tuple[Secret, str | None]:
    """*given* wrapped, and why it is not allowed.

    It raises nothing, because a traceback with local variables would show the secret.
    """
    advice = (
        "give at least 16 bytes, such as secrets.token_hex(32), the same in every replica and "
        "after a restart"
    )
    if given is None:
        given = secrets.token_bytes(32)
    if isinstance(given, str):
        try:
            given = given.encode()
        except UnicodeEncodeError:
            return Secret(""), f"secret holds half a character (a lone surrogate); {advice}"
    if not isinstance(given, _Bytes):
        kind = type(given).__name__
        return Secret(""), f"secret is of type {kind}, not str or bytes; {advice}"
    wrapped = Secret(bytes(given).decode("latin-1"))
    size = len(wrapped.reveal())
    return wrapped, None if size >= 16 else f"secret has {size} bytes; {advice}"


def _headers(status: int) -> dict[str, str]:
    return {"Allow": "POST"} if status == 405 else {}


def _length(header: bytes) -> int | None:
    return int(header) if header.isdigit() and len(header) < 20 else None


async def _aiohttp_chunks(request: web.Request) -> AsyncIterator[bytes]:
    from aiohttp import web  # noqa: PLC0415 - see aiohttp_handler

    try:
        async for chunk in request.content.iter_any():
            yield chunk
    except (web.RequestPayloadError, OSError, EOFError) as exc:
        raise ConnectionError("the connection was lost") from exc


async def _asgi_chunks(receive: _Receive) -> AsyncIterator[bytes]:
    while (message := await receive())["type"] == "http.request":
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
    raise ConnectionError("the connection was lost")
