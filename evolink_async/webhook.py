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
another path is turned away unread.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from attrs import define, evolve, field, frozen

from evolink_async._clock import Clock
from evolink_async._hosts import check_callback_url, shown_url
from evolink_async._models import check_task_id
from evolink_async._session import Session
from evolink_async.errors import ConfigurationError, EvolinkError, RequestValidationError

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["CallbackReceiver", "CallbackStats"]

logger = logging.getLogger(__name__)

Forward = Callable[[str], Awaitable[object]]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_LARGEST: Final = 256 * 1024
"""Bytes a delivery may have: a task read is a few kilobytes."""
_SLOWEST: Final = 10.0
"""Real seconds a delivery may take to arrive: its sender gives up then (API page, callbacks)."""
_REMEMBERED: Final = 10_000
_REMEMBERED_SECONDS: Final = 600.0
_FORWARDS: Final = 1_000
"""Ids that wait to be forwarded at once; more are left to the safety reads."""
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
        forwarded: Ids handed to ``forward``; counted in ``early`` as well.
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
    forwarded: int = 0

    @property
    def received(self) -> int:
        """All deliveries."""
        told = self.nudged + self.early + self.late
        refused = self.too_large + self.too_slow + self.compressed + self.wrong_method
        return told + refused + self.forged + self.malformed


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
        secret: str | bytes | None = None,
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
                same, and keep it over restarts; None for a new one, with which paths made
                earlier are not known any more.
            forward: Awaited with the id of a delivered task that nobody here knows, for
                other replicas to `nudge`; at most once per ``callback_url``.
            forward_after: Seconds such an id is waited for first: a callback may come
                before the answer to its submit.
            default: Whether all submits of the session ask for callbacks.

        Raises:
            ConfigurationError: *public_url* or *secret* cannot be used.
        """
        self._session = session
        self._public_url = _public_url(public_url)
        self._secret = _secret(secret)
        self._forward = forward
        self._forward_after = forward_after
        self._stats = CallbackStats()
        self._tokens = _Memory(session.clock)
        self._ids = _Memory(session.clock)
        self._forwards: set[asyncio.Task[None]] = set()
        if default:
            session.callback = self

    def __repr__(self) -> str:
        return f"<CallbackReceiver {self._public_url}, {self._stats.received} received>"

    @property
    def stats(self) -> CallbackStats:
        """What became of the deliveries so far."""
        return self._stats

    async def aclose(self) -> None:
        """Forward nothing more; only needed with ``forward``."""
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
        came_early = self._tokens.get(token) == _EARLY or self._ids.get(task_id) == _EARLY
        self._tokens.put(token, _KNOWN)
        if came_early:
            self._session.nudge(task_id)

    # -- deliveries ------------------------------------------------------------------------

    async def deliver(self, path: str, body: bytes) -> int:
        """Take the delivery that was POSTed to *path*; returns the status to answer with.

        Args:
            path: The path of its URL; what stands before the last segment does not matter.
            body: What was POSTed, not compressed; better not read beyond 256 KiB.

        Returns:
            204 if it was taken, else 400, 404 or 413.
        """
        try:
            token = self._admit(path)
            return self._take(token, body)
        except _RefusedError as refused:
            return refused.status

    def nudge(self, task_id: str) -> bool:
        """Look at a task now, because another replica was told that it had ended.

        A task nobody here knows is remembered for 10 minutes, in case its submit is still
        in the air; it is not forwarded. Returns whether the task is watched here.

        Raises:
            RequestValidationError: *task_id* cannot be one.
        """
        watched = self._session.nudge(check_task_id(task_id))
        if not watched:
            self._ids.put(task_id, _EARLY)
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
            await response.prepare(request)
            await response.write_eof()
            request.protocol.force_close()
        return response

    async def asgi(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """An ASGI application: mount it, e.g. ``app.mount("/hooks/evolink", receiver.asgi)``."""
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
        return token

    def _take(self, token: str, body: bytes) -> int:
        """Nudge the task a delivery is about, or remember it."""
        task_id = self._task_id(body)
        request = self._session.task(task_id).request
        url = request.callback_url if request is not None else None
        if request is not None and (url or "").rpartition("/")[2] != token:
            raise self._refuse("forged")
        if self._session.nudge(task_id):
            self._tokens.put(token, _KNOWN)
            self._count("nudged")
        elif self._tokens.get(token) is not None:
            self._count("late")
        else:
            self._tokens.put(token, _EARLY)
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
        digest = hmac.digest(self._secret, _DOMAIN + key.encode(), sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()

    def _refuse(self, reason: str) -> _RefusedError:
        self._count(reason)
        return _RefusedError(_REFUSALS[reason])

    def _count(self, name: str) -> None:
        self._stats = evolve(self._stats, **{name: getattr(self._stats, name) + 1})

    # -- other replicas --------------------------------------------------------------------

    def _forward_later(self, task_id: str, token: str) -> None:
        if self._forward is None or len(self._forwards) >= _FORWARDS:
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._forward_unknown(self._forward, task_id, token))
        self._forwards.add(task)
        task.add_done_callback(self._forwards.discard)

    async def _forward_unknown(self, forward: Forward, task_id: str, token: str) -> None:
        clock = self._session.clock
        await clock.sleep_until(clock.now() + self._forward_after)
        if self._tokens.get(token) == _KNOWN:
            return
        self._count("forwarded")
        try:
            await forward(task_id)
        except Exception:  # the service's own code: its trouble is not the sender's
            logger.exception("forwarding the callback of task %s failed", task_id)


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
}
_EARLY: Final = "early"
_KNOWN: Final = "known"


@define
class _Memory:
    """Words about names, for a while: bounded in number and time."""

    clock: Clock
    _entries: OrderedDict[str, tuple[float, str]] = field(factory=OrderedDict, init=False)

    def put(self, name: str, word: str) -> None:
        """Remember *word* of *name*, and forget the oldest where there are too many."""
        self._entries[name] = self.clock.now() + _REMEMBERED_SECONDS, word
        self._entries.move_to_end(name)
        if len(self._entries) > _REMEMBERED:
            self._entries.popitem(last=False)

    def get(self, name: str) -> str | None:
        """What was remembered of *name*, None if it was not, or too long ago."""
        until, word = self._entries.get(name, (0.0, None))
        return word if word is not None and self.clock.now() < until else None


def _public_url(url: str) -> str:
    base = url.rstrip("/")
    reason = check_callback_url(f"{base}/{'k' * _LONGEST_TOKEN}")
    if reason is None and ("?" in base or "#" in base):
        reason = "it has a query or a fragment"
    if reason is not None:
        raise ConfigurationError(
            f"public_url={shown_url(url)!r} is not allowed: {reason}; it is the https address "
            "on a public host at which the API reaches this service, such as "
            "https://app.example.com/hooks/evolink"
        )
    return base


def _secret(secret: str | bytes | None) -> bytes:
    if secret is None:
        return secrets.token_bytes(32)
    given = secret.encode() if isinstance(secret, str) else bytes(secret)
    if len(given) < _SHORTEST_SECRET:
        raise ConfigurationError(
            f"secret has {len(given)} bytes; give at least {_SHORTEST_SECRET}, such as "
            "secrets.token_hex(32), the same in every replica and after a restart"
        )
    return given


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
        if isinstance(exc, TimeoutError):
            raise
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
