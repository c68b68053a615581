"""Result links: opened on foreign hosts, as little trusted as the answers that named them.

Its connections are its own: no API key, no cookie, nothing from a netrc file. Every hop
must be https to a public host, by its spelling and by what it resolves to, so that no
answer can make us fetch from the network we run in.

Imported when a session opens, because aiohttp is slow to import.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Final
from urllib.parse import SplitResult, quote, urljoin, urlunsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from attrs import define, field, frozen
from yarl import URL

from evolink_async._hosts import (
    internal_host_reason,
    is_loopback_host,
    is_public_address,
    shown_url,
    split_url,
)
from evolink_async._http.proxy import environment_proxy
from evolink_async._results.stream import Interrupted
from evolink_async._text import printable
from evolink_async.errors import DownloadError, SessionClosedError

__all__ = ["ResultClient", "ResultStream"]

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 5
_EXPIRED: Final = frozenset({403, 404, 410})
_URL_LIMIT: Final = 8192
_PATH_SAFE: Final = "/%:@!$&'()*+,;=~-._"
_QUERY_SAFE: Final = _PATH_SAFE + "?"
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_HEADERS: Final = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "User-Agent": "evolink-async",
}


@define
class ResultStream:
    """A result that has begun to arrive.

    Attributes:
        status: 200, or 206 for what follows *offset*.
        offset: Position of the first byte; 0 if the host sends all of it again.
        content_type: What the host calls it, None if it does not say.
        content_length: Bytes that will follow, None if the host does not say.
        total: Bytes of the whole result, None if the host does not say.
        etag: Its strong entity tag, None if it has none.
        accepts_ranges: False if the host says it cannot resume.
    """

    status: int
    offset: int = field(kw_only=True)
    content_type: str | None = field(kw_only=True)
    content_length: int | None = field(kw_only=True)
    total: int | None = field(kw_only=True)
    etag: str | None = field(kw_only=True)
    accepts_ranges: bool = field(kw_only=True)
    _body: aiohttp.StreamReader = field(kw_only=True)
    _pace: _Pace = field(kw_only=True)
    _shown: str = field(kw_only=True)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes, in pieces as they arrive.

        Raises:
            DownloadError: The connection broke, or was slower than the minimum rate.
        """
        try:
            while data := await self._pace.wait_for(self._body):
                yield data
        except TimeoutError:
            raise Interrupted(
                f"{self._shown} stalled: less than {self._pace.describe()} arrived", url=self._shown
            ) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as exc:
            # RuntimeError is aiohttp's word for a connection that we closed ourselves.
            raise Interrupted(
                f"{self._shown} broke off: {_words(exc)}", url=self._shown
            ) from _safe_cause(exc)


@define
class _Pace:
    """The least rate a body must arrive at; the time its reader takes does not count."""

    seconds: float
    least: int
    _waited: float = field(default=0.0, init=False)
    _got: int = field(default=0, init=False)

    async def wait_for(self, body: aiohttp.StreamReader) -> bytes:
        """The next bytes.

        Raises:
            TimeoutError: Fewer than *least* bytes came in *seconds* of waiting.
        """
        now = asyncio.get_running_loop().time
        began = now()
        async with asyncio.timeout(max(0.0, self.seconds - self._waited)):
            data = await body.readany()
        self._waited += now() - began
        self._got += len(data)
        if self._got >= self.least:
            self._waited, self._got = 0.0, 0
        return data

    def describe(self) -> str:
        return f"{self.least} bytes in {self.seconds:g} s"


@frozen
class _Hop:
    """One checked address on the way to a result."""

    url: URL
    proxy: str | None = field(kw_only=True)
    shown: str = field(kw_only=True)


class _InternalAddressError(OSError):
    """A name that leads into the network we run in."""


class _GuardedResolver(AbstractResolver):
    """Resolves names, leaving out internal addresses.

    A later answer of the name server cannot differ: aiohttp connects to the addresses
    returned here and does not resolve again.
    """

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of *host* that may be connected to; for ``localhost``, this machine's."""
        found = await self._inner.resolve(host, port, family)
        allowed = is_loopback_host if is_loopback_host(host) else is_public_address
        usable = [entry for entry in found if allowed(entry["host"])]
        if found and not usable:
            reason = internal_host_reason(found[0]["host"]) or "not this machine"
            raise _InternalAddressError(f"it resolves to {found[0]['host']}, {reason}")
        return usable

    async def close(self) -> None:
        """Close the resolver within."""
        await self._inner.close()


class ResultClient:
    """Opens result links. Belongs to one event loop; its connections are made when needed."""

    def __init__(
        self,
        *,
        allow_loopback: bool = False,
        max_connections: int = 8,
        connect_timeout: float = 10.0,
        stall_timeout: float = 30.0,
        min_rate: float = 1000.0,
        trust_env: bool = True,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """A client that has not connected yet.

        Args:
            allow_loopback: Whether links may also lead to this machine, then also by http.
            max_connections: Results open at the same time; more wait.
            connect_timeout: Seconds to make a connection, TLS included.
            stall_timeout: Seconds without progress after which a download is broken off.
            min_rate: Bytes per second, averaged over *stall_timeout*, below which there is
                no progress.
            trust_env: Whether to use the environment's proxies. Names are then resolved by
                the proxy, so only the spelling of a host can be checked here.
            resolver: What resolves names; aiohttp's default if None.
        """
        self._allow_loopback = allow_loopback
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._least = max(1, int(min_rate * stall_timeout))
        self._trust_env = trust_env
        self._resolver = resolver
        self._guard: _GuardedResolver | None = None
        self._slots = asyncio.Semaphore(max_connections)
        self._direct: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None
        self._closed = False

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, *, offset: int = 0, etag: str | None = None
    ) -> AsyncIterator[ResultStream]:
        """The result behind *url*, from byte *offset* on if the host can and it is still *etag*.

        Raises:
            DownloadError: The link is not allowed, has expired, or does not answer;
                `Interrupted` if another try may help.
        """
        async with self._slots, contextlib.AsyncExitStack() as stack:
            hop = self._hop(url, None)
            headers = _request_headers(offset, etag)
            for _ in range(_MAX_REDIRECTS + 1):
                response = await self._request(hop, headers)
                stack.callback(_leave, response)
                if response.status not in _REDIRECTS:
                    yield self._stream(response, hop, offset)
                    return
                response.close()
                hop = self._hop(_target(response, hop), hop)
            raise DownloadError(f"{hop.shown}: more than {_MAX_REDIRECTS} redirects", url=hop.shown)

    async def aclose(self) -> None:
        """Close the connections; open streams break off. May be called again."""
        self._closed = True
        for session in (self._direct, self._proxied):
            if session is not None:
                await session.close()
        if self._guard is not None:  # a connector does not close a resolver it was given
            await self._guard.close()

    def _hop(self, url: str, previous: _Hop | None) -> _Hop:
        """*url*, checked.

        Raises:
            DownloadError: It may not be fetched.
        """
        shown = shown_url(url)
        came_from = "" if previous is None else f" (redirected from {previous.shown})"
        # A redirect from elsewhere to this machine is never meant well.
        loopback = self._allow_loopback and (
            previous is None or is_loopback_host(previous.url.raw_host or "")
        )
        try:
            parts = _checked(url, loopback=loopback)
            target = _encoded(parts)
            # The name aiohttp connects to, not as it was spelled.
            _check_host(target.raw_host or "", loopback=loopback)
            return _Hop(target, proxy=self._proxy_for(target), shown=shown)
        except ValueError as exc:
            raise DownloadError(f"{shown}{came_from} is not fetched: {exc}", url=shown) from None

    def _proxy_for(self, url: URL) -> str | None:
        """The environment's proxy for *url*; this machine is never reached through one."""
        return environment_proxy(str(url)) if self._trust_env else None

    async def _request(self, hop: _Hop, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The answer's head.

        Raises:
            DownloadError: There is none.
        """
        session = self._session(proxied=hop.proxy is not None)
        limit = self._connect_timeout + self._stall_timeout
        try:
            async with asyncio.timeout(limit):
                return await session.get(
                    hop.url, headers=headers, proxy=hop.proxy, allow_redirects=False
                )
        except ValueError:  # its message would hold the whole link
            raise DownloadError(
                f"{hop.shown} is not fetched: the link, or the proxy set in the environment, "
                "is nothing that can be connected to",
                url=hop.shown,
            ) from None
        except (aiohttp.ClientError, OSError) as exc:
            if (reason := _internal(exc)) is not None:
                raise DownloadError(f"{hop.shown} is not fetched: {reason}", url=hop.shown) from exc
            raise Interrupted(
                f"{hop.shown} does not answer: {_words(exc)}", url=hop.shown
            ) from _safe_cause(exc)

    def _session(self, *, proxied: bool) -> aiohttp.ClientSession:
        if self._closed:
            raise SessionClosedError("the session is closed; make a new one")
        if proxied:
            # The resolver only ever sees the proxy's own name, which may well be internal.
            self._proxied = self._proxied or self._new_session(aiohttp.TCPConnector(limit=0))
            return self._proxied
        if self._direct is None:
            self._guard = _GuardedResolver(self._resolver or aiohttp.DefaultResolver())
            self._direct = self._new_session(aiohttp.TCPConnector(limit=0, resolver=self._guard))
        return self._direct

    def _new_session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
            trust_env=False,
        )

    def _stream(self, response: aiohttp.ClientResponse, hop: _Hop, asked: int) -> ResultStream:
        """What the answer's head promises.

        Raises:
            DownloadError: It is not the result.
        """
        _check_status(response.status, hop.shown, asked)
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in {"identity", ""}:
            raise DownloadError(
                f"{hop.shown}: the host compressed the result ({printable(coding, 40)}) unasked",
                url=hop.shown,
                status=response.status,
            )
        offset, total = _range_of(response, hop.shown, asked)
        return ResultStream(
            response.status,
            offset=offset,
            content_type=response.headers.get("Content-Type"),
            content_length=response.content_length,
            total=total,
            etag=_strong(response.headers.get("ETag")),
            accepts_ranges=response.headers.get("Accept-Ranges", "").strip().lower() != "none",
            body=response.content,
            pace=_Pace(self._stall_timeout, self._least),
            shown=hop.shown,
        )


def _request_headers(offset: int, etag: str | None) -> dict[str, str]:
    if offset == 0 or etag is None:
        return {}
    return {"Range": f"bytes={offset}-", "If-Range": etag}


def _strong(etag: str | None) -> str | None:
    """*etag* if it may stand in ``If-Range``: weak ones do not promise the same bytes."""
    return etag if etag is not None and re.fullmatch(r'"[!#-~]{1,200}"', etag) else None


def _leave(response: aiohttp.ClientResponse) -> None:
    """Keep the connection if all of the body was read, drop it otherwise."""
    if response.content.at_eof():
        response.release()
    else:
        response.close()


# ---------------------------------------------------------------------------------------------
# Where a link leads


def _checked(url: str, *, loopback: bool) -> SplitResult:
    """The parts of a link that may be followed.

    Raises:
        ValueError: It may not; the message says why.
    """
    if len(url) > _URL_LIMIT:
        raise ValueError(f"the link has {len(url)} characters")
    try:
        parts = split_url(_without_spaces(url))
    except ValueError as exc:
        raise ValueError(f"the link is unusable: {exc}") from None
    host = parts.hostname or ""
    if parts.scheme != "https" and not (
        parts.scheme == "http" and loopback and is_loopback_host(host)
    ):
        raise ValueError("the link is not https")
    return parts


def _without_spaces(url: str) -> str:
    """Spaces inside the path or query, which some hosts leave unquoted, quoted."""
    head, slash, rest = url.partition("://")
    authority, separator, path = rest.partition("/")
    return f"{head}{slash}{authority}{separator}{path.replace(' ', '%20')}"


def _check_host(host: str, *, loopback: bool) -> None:
    if loopback and is_loopback_host(host):
        return
    if (reason := internal_host_reason(host)) is not None:
        raise ValueError(f"the link's host is {reason}")


def _encoded(parts: SplitResult) -> URL:
    """The link as aiohttp sends it. Already quoted parts stay as they are: they may be signed."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port is None else f":{parts.port}"
    ascii_host = URL(f"{parts.scheme}://{host}{port}/").raw_authority
    path = quote(parts.path or "/", safe=_PATH_SAFE)
    query = quote(parts.query, safe=_QUERY_SAFE)
    return URL(urlunsplit((parts.scheme, ascii_host, path, query, "")), encoded=True)


def _target(response: aiohttp.ClientResponse, hop: _Hop) -> str:
    """Where a redirect leads.

    Raises:
        DownloadError: It does not say.
    """
    location = response.headers.get("Location", "")
    try:
        if location:
            return urljoin(str(hop.url), location)
    except ValueError:
        pass
    raise DownloadError(
        f"{hop.shown}: a redirect that leads nowhere", url=hop.shown, status=response.status
    )


# ---------------------------------------------------------------------------------------------
# What an answer means


def _check_status(status: int, shown: str, asked: int) -> None:
    if status == 200 or (status == 206 and asked):
        return
    if status in _EXPIRED:
        raise DownloadError(
            f"{shown}: the link has expired or is gone ({status}). Result links live 24 hours "
            "after the task completed; reading the task again gives the same links, so "
            "after that the picture has to be generated again",
            url=shown,
            status=status,
            expired=True,
        )
    if status == 416 and asked:
        raise Interrupted(f"{shown}: cannot be resumed", url=shown, status=status, restart=True)
    kind = Interrupted if status in {408, 425, 429} or status >= 500 else DownloadError
    raise kind(f"{shown}: the host answered {status}", url=shown, status=status)


def _range_of(response: aiohttp.ClientResponse, shown: str, asked: int) -> tuple[int, int | None]:
    """Position of the first byte, and size of the whole.

    Raises:
        Interrupted: It is not the part that was asked for.
    """
    if response.status == 200:
        return 0, response.content_length
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if match is None or int(match[1]) != asked:
        raise Interrupted(
            f"{shown}: the host sent another part than asked for",
            url=shown,
            status=response.status,
            restart=True,
        )
    return asked, None if match[3] == "*" else int(match[3])


def _internal(exc: BaseException) -> str | None:
    """The words of the resolver's refusal, if that is what *exc* is about."""
    inner = getattr(exc, "os_error", None)
    return str(inner) if isinstance(inner, _InternalAddressError) else None


def _words(exc: BaseException) -> str:
    """What went wrong, without the link's query, which some of aiohttp's messages hold."""
    if isinstance(exc, aiohttp.ClientHttpProxyError):
        return f"the proxy answered {exc.status}"
    if isinstance(exc, aiohttp.ClientResponseError):
        return "the answer is not HTTP"
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    return printable(str(exc), 200) or type(exc).__name__


def _safe_cause(exc: BaseException) -> BaseException | None:
    """*exc*, unless its text holds the whole link."""
    return None if isinstance(exc, aiohttp.ClientResponseError) else exc
