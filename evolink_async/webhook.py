"""Callbacks: the API tells of a task's end, and nobody polls.

::

    session = Session()
    receiver = CallbackReceiver(
        session, public_url="https://app.example.com/hooks/evolink", secret=SECRET
    )
    app.router.add_route("*", "/hooks/evolink/{token}", receiver.aiohttp_handler)  # aiohttp.web
    app.mount("/hooks/evolink", receiver.asgi)                     # FastAPI, Starlette, any ASGI
    status = await receiver.deliver(path, body)                    # anything else

The API's page documents no signature, so a callback is only a hint: a delivery makes the
session look at its task now, and what the task is comes from that look. Each submit gets a
``callback_url`` of its own, ending in ``<idempotency key>.<HMAC of it>``; what comes to
another path is turned away unread. Who knows that path can have its task read, so keep it
out of access logs: ``access_log=None`` in aiohttp.web, ``access_log=False`` in uvicorn.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
import json
import logging
import math
import re
import secrets
from base64 import urlsafe_b64encode
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from attrs import define, evolve, field, frozen

from evolink_async._checks import refuse
from evolink_async._clock import Clock
from evolink_async._hosts import check_callback_url, shown_url
from evolink_async._http.secret import Secret
from evolink_async._model.requests import check_task_id
from evolink_async._session import Session
from evolink_async._text import shown
from evolink_async.errors import ConfigurationError, EvolinkError, RequestValidationError

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["CallbackReceiver", "CallbackStats"]

logger = logging.getLogger(__name__)

_Bytes = bytes | bytearray | memoryview
Forward = Callable[[str], Awaitable[object]]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_LARGEST: Final = 256 * 1024
"""Bytes a delivery may have: a task read is a few kilobytes."""
_SLOWEST: Final = 10.0
"""Real seconds a delivery may take to arrive: its sender gives up then (API page, callbacks)."""
_REMEMBERED: Final = 10_000
"""URLs with deliveries of unknown tasks; and, apart from them, ids other replicas told of."""
_REMEMBERED_SECONDS: Final = 600.0
_IDS_PER_URL: Final = 4
"""Unknown ids one URL is believed to be about: the first may be a lie of who found it."""
_KNOWN: Final = 100_000
"""Newest URLs that are known to be of tasks of this session; each takes some 80 bytes."""
_FORWARDS: Final = 1_000
"""Ids that wait to be forwarded at once; more are left to the safety reads."""
_FORWARD_SECONDS: Final = 10.0
"""Real seconds one call of ``forward`` may take."""
_SHORTEST_SECRET: Final = 16
_TOKEN: Final = re.compile(r"([A-Za-z0-9._-]{16,96})\.([A-Za-z0-9_-]{43})")
_LONGEST_TOKEN: Final = 96 + 1 + 43
_DOMAIN: Final = b"evolink-async callback\0"


@frozen(kw_only=True)
class CallbackStats:
    """What became of the deliveries so far; each is counted once.

    Attributes:
        nudged: Told of a running task, which is read now, or its shortest interval after
            its last read.
        early: Of an unknown task: remembered until its submit is answered.
        late: Repeats, and those of tasks that had ended; they cost no read.
        forged: To a path this receiver did not make, or with the id of another task.
        malformed: Their body was cut, not JSON, or without a task id.
        too_large: Their body was longer than any task (256 KiB).
        too_slow: Their body took longer than their sender waits (10 s).
        compressed: Their body was compressed; it is not unpacked.
        wrong_method: They were not POSTs.
        closed: The session was closed; their sender is asked to try again.
        forwarded: Ids handed to ``forward``; counted in ``early`` as well.
        dropped: Ids not forwarded, because 1000 were waiting for it; counted in ``early``
            as well.
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
    forwarded: int = 0
    dropped: int = 0

    @property
    def received(self) -> int:
        """All deliveries."""
        told = self.nudged + self.early + self.late
        refused = self.too_large + self.too_slow + self.compressed + self.wrong_method
        return told + refused + self.forged + self.malformed + self.closed


class CallbackReceiver:
    """Receives a session's callbacks, in the session's event loop.

    It makes itself the ``callback`` of the session, so that every submit asks for a
    callback; with ``default=False`` only those do that say ``callback=receiver``.
    """

    def __init__(
        self,
        session: Session,
        *,
        public_url: str,
        secret: str | _Bytes | None = None,
        forward: Forward | None = None,
        forward_after: float = 1.0,
        default: bool = True,
    ) -> None:
        """Prepare to receive; nothing is opened or sent.

        Args:
            session: Whose tasks the callbacks are about.
            public_url: Where the API reaches this receiver: https on a public host, to
                which a path segment of at most 140 characters is added.
            secret: What the paths are signed with, at least 16 bytes. Give all replicas the
                same, and keep it over restarts. None for a new one: paths made earlier are
                not known any more, and a submit repeated with its idempotency key asks for
                another ``callback_url``, which the gateway refuses (409,
                ``idempotency_conflict``).
            forward: Awaited with the id of a delivered task that nobody here knows, for
                other replicas to `nudge`; once per id, for at most 4 ids per
                ``callback_url``, and for at most 10 real seconds. See `aclose`.
            forward_after: Seconds such an id is waited for first: a callback may come
                before the answer to its submit.
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
        self._session = _session(session)
        self._public_url = _public_url(public_url)
        self._forward = _forward(forward)
        self._forward_after = _forward_after(forward_after)
        self._early = _Memory(session.clock)
        self._told = _Memory(session.clock)
        self._known = _Known()
        self._forwards: set[asyncio.Task[None]] = set()
        if default:
            session.callback = self

    def __repr__(self) -> str:
        return f"<CallbackReceiver {self._public_url}, {self._stats.received} received>"

    @property
    def session(self) -> Session:
        """Whose tasks the callbacks are about."""
        return self._session

    @property
    def stats(self) -> CallbackStats:
        """What became of the deliveries so far."""
        return self._stats

    async def aclose(self) -> None:
        """Forward nothing more; needed with ``forward``, whose calls may be waiting."""
        self._forward = None
        forwards = tuple(self._forwards)
        for forward in forwards:
            forward.cancel()
        await asyncio.gather(*forwards, return_exceptions=True)

    # -- what the session asks -------------------------------------------------------------

    def url_for(self, idempotency_key: str) -> str:
        """The ``callback_url`` of the submit with that key: always the same for a secret."""
        return f"{self._public_url}/{idempotency_key}.{self._signature(idempotency_key)}"

    def registered(self, task_id: str, callback_url: str) -> None:
        """A submit with *callback_url* was answered: it made *task_id*."""
        token = callback_url.rpartition("/")[2]
        self._known.add(token)
        if self._early.get(token) or self._told.get(task_id):
            self._session.nudge(task_id)

    # -- deliveries ------------------------------------------------------------------------

    async def deliver(self, path: str, body: _Bytes) -> int:
        """Take the delivery that was POSTed to *path*; returns the status to answer with.

        Args:
            path: The path of its URL, perhaps with a query, which does not matter, nor does
                what stands before the last segment.
            body: What was POSTed, not compressed; better not read beyond 256 KiB.

        Returns:
            204 if it was taken; 400 for a body that is no task, 404 for a path not made
            here (also with a slash after it), 413 for a body beyond 256 KiB, 503 once the
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
            return self._take(self._admit(path.partition("?")[0]), bytes(body))
        except _RefusedError as refused:
            return refused.status

    def nudge(self, task_id: str) -> bool:
        """Look at a task now, because another replica was told that it had ended.

        A task nobody here knows is remembered for 10 minutes, in case its submit is still
        in the air; it is not forwarded. Returns whether the task is watched here.

        Raises:
            RequestValidationError: *task_id* cannot be one.
            ConfigurationError: This is not the event loop of the session.
        """
        self._session.check_loop()
        watched = self._session.nudge(check_task_id(task_id))
        if not watched:
            self._told.add(task_id, task_id)
        return watched

    async def aiohttp_handler(self, request: web.Request) -> web.Response:
        """Answer a request to an ``aiohttp.web`` application.

        Add it as ``add_route("*", "/hooks/evolink/{token}", receiver.aiohttp_handler)``.
        """
        from aiohttp import web  # noqa: PLC0415 - only users of aiohttp.web load it

        encoding = request.headers.get("Content-Encoding", "")
        status = await self._receive(
            request.method, request.path, encoding, request.content_length, _aiohttp_chunks(request)
        )
        response = web.Response(status=status, headers=_headers(status))
        if status != _TAKEN and not request.content.is_eof():
            # The server would read, and unpack, the rest of the body for a while.
            response.force_close()
            with suppress(ConnectionError):  # whoever cut the body may be gone
                await response.prepare(request)
                await response.write_eof()
            request.protocol.force_close()
        return response

    @property
    def asgi(self) -> _AsgiApplication:
        """An ASGI application: mount it, e.g. ``app.mount("/hooks/evolink", receiver.asgi)``."""
        return _AsgiApplication(self._answer)

    async def _answer(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
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
            closes = status != _TAKEN and str(scope.get("http_version", "1.1")).startswith("1")
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
        """Take a delivery while it arrives; reads no more of it than it must."""
        self._session.check_loop()
        try:
            if method != "POST":
                raise self._refuse("wrong_method")
            token = self._admit(path)
            if encoding.strip().lower() not in {"", "identity"}:
                raise self._refuse("compressed")
            if length is not None and length > _LARGEST:
                raise self._refuse("too_large")
            return self._take(token, await self._read(chunks))
        except _RefusedError as refused:
            return refused.status

    async def _read(self, chunks: AsyncIterator[bytes]) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(_SLOWEST):
                async for chunk in chunks:
                    body += chunk
                    if len(body) > _LARGEST:
                        raise self._refuse("too_large")
        except TimeoutError:
            raise self._refuse("too_slow") from None
        except _CutError:
            raise self._refuse("malformed") from None
        return bytes(body)

    def _admit(self, path: str) -> str:
        """The token *path* ends in, if it is one of ours."""
        token = path.rpartition("/")[2]
        match = _TOKEN.fullmatch(token) if len(token) <= _LONGEST_TOKEN else None
        if match is None or not hmac.compare_digest(self._signature(match[1]), match[2]):
            raise self._refuse("forged")
        if self._session.closed:
            raise self._refuse("closed")
        return token

    def _take(self, token: str, body: bytes) -> int:
        """Nudge the task a delivery is about, or remember it."""
        task_id = self._task_id(body)
        request = self._session.task(task_id).request
        url = request.callback_url if request is not None else None
        if request is not None and (url or "").rpartition("/")[2] != token:
            raise self._refuse("forged")
        if self._session.nudge(task_id):
            self._known.add(token)
            self._count("nudged")
        elif token in self._known or task_id in (told := self._early.get(token)):
            self._count("late")
        elif len(told) >= _IDS_PER_URL:
            raise self._refuse("forged")
        else:
            self._early.add(token, task_id)
            self._count("early")
            self._forward_later(task_id, token)
        return _TAKEN

    def _task_id(self, body: bytes) -> str:
        if len(body) > _LARGEST:
            raise self._refuse("too_large")
        try:
            task = json.loads(body)
            return check_task_id(task.get("id") if isinstance(task, dict) else None)
        except (ValueError, RecursionError, RequestValidationError):
            raise self._refuse("malformed") from None

    def _signature(self, key: str) -> str:
        digest = hmac.digest(
            self._secret.reveal().encode("latin-1"), _DOMAIN + key.encode(), sha256
        )
        return urlsafe_b64encode(digest).rstrip(b"=").decode()

    def _refuse(self, reason: str) -> _RefusedError:
        self._count(reason)
        return _RefusedError(_REFUSALS[reason])

    def _count(self, name: str) -> None:
        self._stats = evolve(self._stats, **{name: getattr(self._stats, name) + 1})

    # -- other replicas --------------------------------------------------------------------

    def _forward_later(self, task_id: str, token: str) -> None:
        if self._forward is None:
            return
        if len(self._forwards) >= _FORWARDS:
            self._drop()
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._forward_unknown(self._forward, task_id, token))
        self._forwards.add(task)
        task.add_done_callback(self._forwards.discard)

    def _drop(self) -> None:
        if not self._stats.dropped:
            logger.warning(
                "%d ids wait to be forwarded: more are dropped, and their tasks found by the "
                "safety reads of other replicas; is forward=%r too slow?",
                len(self._forwards),
                self._forward,
            )
        self._count("dropped")

    async def _forward_unknown(self, forward: Forward, task_id: str, token: str) -> None:
        clock = self._session.clock
        await clock.sleep_until(clock.now() + self._forward_after)
        if token in self._known:
            return
        self._count("forwarded")
        try:
            async with asyncio.timeout(_FORWARD_SECONDS):
                await _awaitable(forward, task_id)
        except Exception:  # the service's own code: its trouble is not the sender's
            logger.exception(
                "forwarding the callback of task %s failed (it may take %g s)",
                task_id,
                _FORWARD_SECONDS,
            )


class _AsgiApplication:
    """An object with ``__call__``: servers take a bound method for an ASGI 2 application."""

    def __init__(self, answer: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        await self._answer(scope, receive, send)


class _RefusedError(EvolinkError):
    """A delivery that is not taken, with the status it is answered with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"refused with {status}")
        self.status = status


class _CutError(EvolinkError):
    """The rest of a body will not come."""


_TAKEN: Final = 204
_REFUSALS: Final = {
    "forged": 404,
    "malformed": 400,
    "too_large": 413,
    "too_slow": 408,
    "compressed": 415,
    "wrong_method": 405,
    "closed": 503,
}


@define
class _Memory:
    """Ids that came with names, for a while: bounded in number and time."""

    clock: Clock
    _entries: OrderedDict[str, tuple[float, tuple[str, ...]]] = field(
        factory=OrderedDict, init=False
    )

    def add(self, name: str, task_id: str) -> None:
        """Remember *task_id* with *name*, and forget the oldest name where there are too many."""
        self._entries[name] = (
            self.clock.now() + _REMEMBERED_SECONDS,
            (*self.get(name), task_id),
        )
        self._entries.move_to_end(name)
        if len(self._entries) > _REMEMBERED:
            self._entries.popitem(last=False)

    def get(self, name: str) -> tuple[str, ...]:
        """The ids that came with *name*, unless it was too long ago."""
        until, ids = self._entries.get(name, (0.0, ()))
        return ids if self.clock.now() < until else ()


@define
class _Known:
    """The newest tokens of the session's own tasks, as hashes: bounded in number only.

    A task may run for an hour, and its callback be late; nobody says when it has ended.
    """

    _order: deque[int] = field(factory=deque, init=False)
    _hashes: set[int] = field(factory=set, init=False)

    def __contains__(self, token: str) -> bool:
        return hash(token) in self._hashes

    def add(self, token: str) -> None:
        """Know *token*, and forget the oldest where there are too many."""
        if token in self:
            return
        self._order.append(hash(token))
        self._hashes.add(hash(token))
        if len(self._order) > _KNOWN:
            self._hashes.discard(self._order.popleft())


def _awaitable(forward: Forward, task_id: str) -> Awaitable[object]:
    """What ``forward`` returns, which its type cannot promise at run time."""
    returned = forward(task_id)
    if not inspect.isawaitable(returned):
        raise ConfigurationError(
            f"forward={forward!r} returned {type(returned).__name__}, which cannot be awaited; "
            "make it an async function"
        )
    return returned


# -- settings ----------------------------------------------------------------------------------


def _session(session: Session) -> Session:
    if not isinstance(session, Session):
        raise refuse("session", session, "an evolink_async.Session")
    return session


def _public_url(url: str) -> str:
    if not isinstance(url, str):
        raise refuse("public_url", url, _PUBLIC_URL)
    base = url.rstrip("/")
    reason = check_callback_url(f"{base}/{'k' * _LONGEST_TOKEN}")
    if reason is None and ("?" in base or "#" in base):
        reason = "it has a query or a fragment"
    if reason is not None:
        raise refuse("public_url", shown_url(url), _PUBLIC_URL, reason)
    return base


_PUBLIC_URL: Final = (
    "the https address on a public host at which the API reaches this service, such as "
    "'https://app.example.com/hooks/evolink'"
)


def _secret(given: object) -> tuple[Secret, str | None]:
    """*given* wrapped, and why it is not allowed; raises nothing, or its frame would show it."""
    if given is None:
        given = secrets.token_bytes(32)
    if isinstance(given, str):
        try:
            given = given.encode()
        except UnicodeEncodeError:
            return Secret(""), f"secret holds half a character (a lone surrogate); give {_SECRET}"
    if not isinstance(given, _Bytes):
        kind = type(given).__name__
        return Secret(""), f"secret is of type {kind}, not str or bytes; give {_SECRET}"
    wrapped = Secret(bytes(given).decode("latin-1"))
    size = len(wrapped.reveal())
    return wrapped, None if size >= _SHORTEST_SECRET else f"secret has {size} bytes; give {_SECRET}"


_SECRET: Final = (
    f"at least {_SHORTEST_SECRET} bytes, such as secrets.token_hex(32), the same in every "
    "replica and after a restart"
)


def _forward(forward: Forward | None) -> Forward | None:
    never = inspect.isclass(forward) or inspect.isbuiltin(forward)
    if forward is not None and (never or not callable(forward)):
        raise ConfigurationError(
            f"forward={shown(forward)} is not allowed: an async function of a task's id, or None"
        )
    return forward


def _forward_after(seconds: float) -> float:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds < math.inf:
        raise ConfigurationError(
            f"forward_after={shown(seconds)} is not allowed: seconds, 0 or more"
        )
    return float(seconds)


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
        raise _CutError("the connection was lost") from exc


async def _asgi_chunks(receive: _Receive) -> AsyncIterator[bytes]:
    while (message := await receive())["type"] == "http.request":
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
    raise _CutError("the connection was lost")


async def _live(receive: _Receive, send: _Send) -> None:
    """Answer to a server's start and stop, for servers that insist."""
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})
