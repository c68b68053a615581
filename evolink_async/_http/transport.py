"""The connection to the API's origin: the one module that holds the key.

Imported when a session opens, because aiohttp is slow to import and ``--help`` needs none of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final

import aiohttp
from attrs import define

from evolink_async._clock import Clock, hold
from evolink_async._http import protocol
from evolink_async._http.breaker import BatchBreaker
from evolink_async._http.limiter import Limiter
from evolink_async._http.proxy import environment_proxy
from evolink_async._http.retry import Retries, Timeout
from evolink_async._http.secret import Secret
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import TaskSnapshot
from evolink_async._text import printable
from evolink_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ConfigurationError,
    EvolinkError,
    InvalidResponseError,
)

__all__ = ["Answer", "PollResult", "Transport"]

logger = logging.getLogger(__name__)

_USER_AGENT: Final = f"evolink-async/{version('evolink-async')}"
_BODY_LIMIT: Final = 1024 * 1024
_BATCH_BODY_LIMIT: Final = 8 * _BODY_LIMIT
_SUBMIT_KEEP_ALIVE: Final = 2.0
"""Seconds a submit's connection may idle: a server that closes it under a POST leaves the
outcome unknown, and aiohttp (rightly) does not resend a POST."""
_READ_KEEP_ALIVE: Final = 15.0


@define
class Answer:
    """A complete HTTP answer.

    Attributes:
        status: Its status code.
        body: Its decompressed body.
        sent_at: When its request was sent, on the session's clock.
        headers: Those that its meaning depends on.
    """

    status: int
    body: bytes
    sent_at: float
    headers: Mapping[str, str]

    @property
    def is_replayed(self) -> bool:
        """Whether it is the stored answer to an earlier request."""
        return protocol.is_replayed(self.headers)

    def json(self) -> Any:
        """Its JSON value.

        Raises:
            EvolinkError: It is an error, or not JSON.
        """
        return protocol.decipher(self.status, self.headers, self.body)


@define(kw_only=True)
class PollResult:
    """What came of one poll.

    Attributes:
        sent_at: When the request was sent.
        received_at: When its answer was complete.
        answers: By id: the task, the error, or None for an id a batch answer left out. Those
            about which nothing was learned are absent: they are polled again.
    """

    sent_at: float
    received_at: float
    answers: Mapping[str, TaskSnapshot | EvolinkError | None]


class Transport:
    """Sends requests to the API's origin and turns answers into values or our errors."""

    def __init__(
        self,
        *,
        api_key: Secret,
        base_url: str,
        clock: Clock,
        limiter: Limiter,
        timeout: Timeout,
        retries: Retries,
        http: aiohttp.ClientSession | None,
    ) -> None:
        """A transport on the running loop; *http* stays the caller's."""
        self._key = api_key
        self._base_url = base_url
        self._clock = clock
        self._limiter = limiter
        self._timeout = timeout
        self.retries = retries
        self._own: list[aiohttp.ClientSession] = []
        self._closing_clients: set[asyncio.Task[None]] = set()
        self._proxy = None if http is not None else environment_proxy(base_url)
        self._submit_http = http or self._client(_SUBMIT_KEEP_ALIVE)
        self._read_http = http or self._client(_READ_KEEP_ALIVE)
        self.closing = False
        self.submits = self.reads = self.ids_read = 0
        self._breaker = BatchBreaker(clock)

    def _client(self, keep_alive: float) -> aiohttp.ClientSession:
        # limit=0: the limiter is the limit; aiohttp's pool must never queue (see Limiter).
        client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_alive),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._own.append(client)
        return client

    def renew(self) -> None:
        """Use new connections from now on: the present ones may be dead."""
        if not self._own:
            return
        loop = asyncio.get_running_loop()
        for client, timeout in (
            (self._read_http, self._timeout.read),
            (self._submit_http, self._timeout.submit),
        ):
            # Not made by a task factory of the caller's: that may refuse.
            closing = asyncio.Task(self._close_later(client, timeout), loop=loop)
            self._closing_clients.add(closing)
            closing.add_done_callback(self._closing_clients.discard)
        self._read_http = self._client(_READ_KEEP_ALIVE)
        self._submit_http = self._client(_SUBMIT_KEEP_ALIVE)

    async def _close_later(self, client: aiohttp.ClientSession, seconds: float) -> None:
        """Close *client* once every request in flight on it has had its time-out."""
        await asyncio.sleep(seconds)
        await client.close()
        self._own.remove(client)

    async def aclose(self) -> None:
        """Close what we opened."""
        self._limiter.close()
        for closing in tuple(self._closing_clients):
            closing.cancel()
        await asyncio.gather(*self._closing_clients, return_exceptions=True)
        for client in self._own:
            await client.close()

    # -- one exchange ---------------------------------------------------------------------

    async def _exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Answer:
        """Send one request and read its answer whole; with a key it is a submit.

        Raises:
            APIConnectionError: No answer; ``sent`` says whether the request may have arrived.
            InvalidResponseError: The answer is larger than any the API gives.
        """
        submit = idempotency_key is not None
        client = self._submit_http if submit else self._read_http
        timeout = self._timeout.submit if submit else self._timeout.read
        if client.closed:
            raise ConfigurationError("the aiohttp session handed in as http= is closed")
        failure: EvolinkError
        response: aiohttp.ClientResponse | None
        with hold(self._clock):
            sent_at = self._clock.now()
            try:
                async with client.request(
                    method,
                    self._base_url + path,
                    data=body,
                    params=params,
                    headers=self._headers(idempotency_key),
                    timeout=_http_timeout(timeout, self._timeout.connect),
                    allow_redirects=False,
                    raise_for_status=False,
                    proxy=self._proxy,
                ) as response:
                    limit = _BATCH_BODY_LIMIT if path == protocol.BATCH_PATH else _BODY_LIMIT
                    content = await _read(response, limit)
                    # The server may echo our key.
                    content = self._key.redact_bytes(_unescaped(content))
                    headers = {
                        name: self._key.redact(response.headers[name])
                        for name in protocol.ANSWER_HEADERS
                        if name in response.headers
                    }
                    return Answer(response.status, content, sent_at, headers)
            except asyncio.CancelledError as exc:
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                failure = self._translate(exc)  # raised by the caller's tracer, not by a cancel
            except Exception as exc:  # noqa: BLE001 - the tracer may raise anything
                failure = self._translate(exc)
        # Raised out here: the traceback of aiohttp's exception holds the headers, and so the key.
        response = None
        raise failure

    def _headers(self, idempotency_key: str | None) -> dict[str, str]:
        headers = {
            "Authorization": f"Bearer {self._key.reveal()}",
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": _USER_AGENT,
        }
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        return headers

    def _translate(self, exc: BaseException) -> EvolinkError:
        if isinstance(exc, _TooLargeError):
            return InvalidResponseError("the answer is larger than any the API gives")
        text = str(exc)
        if isinstance(exc, aiohttp.ClientResponseError):
            text = f"{exc.status} {exc.message}"
        why = printable(self._key.redact(text or type(exc).__name__), 200)
        kind = type(exc).__name__
        never_sent = isinstance(
            exc,
            aiohttp.ClientConnectorError
            | aiohttp.ClientHttpProxyError
            | aiohttp.ConnectionTimeoutError
            | aiohttp.InvalidURL,
        )
        if isinstance(exc, TimeoutError):
            stage = "no connection in time" if never_sent else "no complete answer in time"
            return APITimeoutError(f"{stage} from {self._base_url}: {why}", sent=not never_sent)
        stage = "cannot connect to" if never_sent else "connection broken to"
        return APIConnectionError(f"{stage} {self._base_url} ({kind}): {why}", sent=not never_sent)

    def _check_status(self, answer: Answer, model: str | None = None) -> None:
        """Note what an answer means for the requests to come.

        Raises:
            APIStatusError: It is an error.
        """
        if 200 <= answer.status < 300:
            self._limiter.succeeded(sent_at=answer.sent_at, model=model)
            self.retries.budget.give()
            return
        try:
            answer.json()
        except APIStatusError as exc:
            if exc.is_throttle:
                self._limiter.cool_down(exc, sent_at=answer.sent_at, model=model)
            else:
                self._limiter.succeeded(sent_at=answer.sent_at)
            raise

    # -- submits --------------------------------------------------------------------------

    async def post(self, request: ImageRequest | RawRequest, *, idempotency_key: str) -> Answer:
        """Send one submit, for which there must be a permit.

        Raises:
            EvolinkError: It was not answered, or with an error.
        """
        self.submits += 1
        answer = await self._exchange(
            "POST",
            request.path,
            body=protocol.encode(request.body()),
            idempotency_key=idempotency_key,
        )
        self._check_status(answer, request.model)
        return answer

    # -- reads ----------------------------------------------------------------------------

    @property
    def read_limit(self) -> int:
        """Tasks one read may ask for: one if the batch endpoint cannot be used."""
        return protocol.BATCH_LIMIT if self._breaker.allows_batch() else 1

    def fetch(self, ids: tuple[str, ...]) -> asyncio.Task[PollResult]:
        """Read tasks once. Nothing is raised: the error of a failed read is the answer of each id.

        When this returns, `read_limit` already takes this read into account.
        """
        probe, stops = self._breaker.begin(single=len(ids) == 1), self._breaker.stops
        # Not made by a task factory of the caller's: that may refuse.
        read = asyncio.Task(
            self._fetch(ids, probe=probe, stops=stops), loop=asyncio.get_running_loop()
        )
        if probe:
            read.add_done_callback(lambda _: self._breaker.test_ended())
        return read

    async def _fetch(self, ids: tuple[str, ...], *, probe: bool, stops: int) -> PollResult:
        single = len(ids) == 1
        permit = self._limiter.try_acquire() or await self._limiter.acquire()
        sent_at = self._clock.now()
        if not (single or probe) and self._breaker.stops > stops:
            permit.release(unused=True)
            return PollResult(sent_at=sent_at, received_at=sent_at, answers={})
        answers: Mapping[str, TaskSnapshot | EvolinkError | None]
        failure: EvolinkError | None = None
        try:
            self.reads += 1
            self.ids_read += len(ids)
            if single:
                answer = await self._exchange("GET", protocol.task_path(ids[0]))
            else:
                body = protocol.encode({"task_ids": ids})
                answer = await self._exchange("POST", protocol.BATCH_PATH, body=body)
            sent_at = answer.sent_at
            self._check_status(answer)
            if single:
                answers = {ids[0]: protocol.read_task(answer.body, ids[0])}
            else:
                answers = protocol.read_tasks(answer.body, ids)
                if not any(answers.values()):
                    failure = InvalidResponseError("the batch answer has none of the tasks")
        except EvolinkError as exc:
            failure = exc
            self.retries.budget.take(exc)
            refused = not single and self._breaker.refuses(exc)
            answers = {} if refused else dict.fromkeys(ids, exc)
        finally:
            permit.release()
        if single:
            self._breaker.record_single(failure, sent_at=sent_at)
        else:
            self._breaker.record(failure, sent_at=sent_at, probe=probe)
        return PollResult(sent_at=sent_at, received_at=self._clock.now(), answers=answers)

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """Read anything else, trying again as the policy says."""

        async def attempt() -> Any:
            with await self._limiter.acquire():
                self.reads += 1
                answer = await self._exchange("GET", path, params=params)
                self._check_status(answer)
                return answer.json()

        return await self.retries.run(attempt, lambda exc: not self.closing and exc.retryable)

    def backoff(self, failures: int) -> float:
        """Seconds until a task whose reads failed so often in a row is read again."""
        return self.retries.wait_after(failures)


@lru_cache(maxsize=8)
def _http_timeout(total: float, connect: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total, connect=min(connect, total))


class _TooLargeError(ValueError):
    """An answer beyond any size the API gives."""


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body, decompressed, counted while it streams."""
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            response.close()
            raise _TooLargeError
    return b"".join(chunks)


def _unescaped(body: bytes) -> bytes:
    """*body* with uniform JSON escapes, so that the key is found in it even if it was escaped."""
    if b"\0" in body:  # UTF-16 or UTF-32 could hide the key, too: made invalid, and readable
        return b"\xff" + body.replace(b"\0", b"")
    if b"\\" not in body:
        return body
    try:
        return json.dumps(json.loads(body)).encode()
    except (ValueError, RecursionError):
        return body
