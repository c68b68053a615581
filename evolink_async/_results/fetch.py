"""Opens result links on hosts that are not trusted.

`ResultClient` has connections of its own: it sends no API key, no cookie and nothing from a
netrc file. Each hop must be https to a public host, by its spelling and by the addresses it
resolves to, so that no answer can make us fetch from the network we run in.

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
from evolink_async._results.save import Stream, TransientDownloadError
from evolink_async._text import printable
from evolink_async.errors import DownloadError, SessionClosedError

__all__ = ["ResultClient"]

_MAX_REDIRECTS: Final = 5
_MAX_URL: Final = 8192
"""Characters of a link."""


@define
class _StallTimer:
    """Breaks off a body that arrives too slowly; the time its reader takes does not count."""

    seconds: float
    min_bytes: int
    _waited: float = field(default=0.0, init=False)
    _got: int = field(default=0, init=False)

    async def wait_for(self, body: aiohttp.StreamReader) -> bytes:
        """The next bytes.

        Raises:
            TimeoutError: Fewer than *min_bytes* came in *seconds* of waiting.
        """
        now = asyncio.get_running_loop().time
        began = now()
        async with asyncio.timeout(max(0.0, self.seconds - self._waited)):
            data = await body.readany()
        self._waited += now() - began
        self._got += len(data)
        if self._got >= self.min_bytes:
            self._waited, self._got = 0.0, 0
        return data


@frozen
class _Hop:
    """A link, or the target of a redirect, that has been checked."""

    url: URL
    proxy: str | None = field(kw_only=True)
    shown: str = field(kw_only=True)


class _InternalAddressError(OSError):
    """A host name that resolves to an internal address."""


class _GuardedResolver(AbstractResolver):
    """Resolves names and leaves out internal addresses.

    aiohttp connects to the addresses returned here and does not resolve the name again.
    """

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Public addresses of *host*; for ``localhost``, loopback addresses."""
        found = await self._inner.resolve(host, port, family)
        allowed = is_loopback_host if is_loopback_host(host) else is_public_address
        usable = [entry for entry in found if allowed(entry["host"])]
        if found and not usable:
            reason = internal_host_reason(found[0]["host"]) or "not this machine"
            raise _InternalAddressError(f"it resolves to {found[0]['host']}, {reason}")
        return usable

    async def close(self) -> None:
        """Close the inner resolver."""
        await self._inner.close()


class ResultClient:
    """Opens result links. Belongs to one event loop and connects when needed."""

    def __init__(
        self,
        *,
        allow_loopback: bool = False,
        max_connections: int = 8,
        connect_timeout: float = 10.0,
        stall_timeout: float = 30.0,
        min_rate: float = 1000.0,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """Prepare a client; nothing is opened yet.

        A proxy of the environment is used. It resolves names itself, so that only the
        spelling of a host is checked here.

        Args:
            allow_loopback: Whether links may lead to this machine, by http as well.
            max_connections: Results open at the same time; more wait.
            connect_timeout: Seconds to make a connection, TLS included.
            stall_timeout: Seconds over which the rate of a download is measured.
            min_rate: Bytes per second below which a download is broken off.
            resolver: Resolves names; aiohttp's default if None.
        """
        self._allow_loopback = allow_loopback
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._min_bytes = max(1, int(min_rate * stall_timeout))
        self._resolver = resolver
        self._guard: _GuardedResolver | None = None
        self._slots = asyncio.Semaphore(max_connections)
        self._direct: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None
        self._closed = False

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, offset: int = 0, etag: str | None = None
    ) -> AsyncIterator[Stream]:
        """The result behind *url*.

        It starts at byte *offset* if the host can resume and the result still has *etag*,
        otherwise at the first byte.

        Raises:
            TransientDownloadError: The host did not answer as it should; try again.
            DownloadError: The link is not allowed or has expired.
        """
        resume = {} if etag is None else {"Range": f"bytes={offset}-", "If-Range": etag}
        headers = resume if offset else {}
        async with self._slots, contextlib.AsyncExitStack() as stack:
            hop = self._hop(url, None)
            for _ in range(_MAX_REDIRECTS + 1):
                response = await self._request(hop, headers)
                stack.callback(_release, response)
                if response.status not in {301, 302, 303, 307, 308}:
                    yield self._stream(response, hop, offset)
                    return
                response.close()
                hop = self._hop(_target(response, hop), hop)
            raise DownloadError(f"{hop.shown}: more than {_MAX_REDIRECTS} redirects", url=hop.shown)

    async def aclose(self) -> None:
        """Close the connections and break off open streams. May be called again."""
        self._closed = True
        for session in (self._direct, self._proxied):
            if session is not None:
                await session.close()
        if self._guard is not None:  # a connector does not close the resolver it was given
            await self._guard.close()

    def _hop(self, url: str, previous: _Hop | None) -> _Hop:
        """*url* once it has been checked.

        Raises:
            DownloadError: It must not be fetched.
        """
        shown = shown_url(url)
        came_from = "" if previous is None else f" (redirected from {previous.shown})"
        # A redirect from another host to this machine is an attack.
        loopback = self._allow_loopback and (
            previous is None or is_loopback_host(previous.url.raw_host or "")
        )
        try:
            target = _checked(url, loopback=loopback)
            return _Hop(target, proxy=environment_proxy(str(target)), shown=shown)
        except ValueError as exc:
            raise DownloadError(f"{shown}{came_from} is not fetched: {exc}", url=shown) from None

    async def _request(self, hop: _Hop, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The status and headers of the answer.

        Raises:
            DownloadError: No answer came.
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
            raise TransientDownloadError(
                f"{hop.shown} does not answer: {_words(exc)}", url=hop.shown
            ) from _safe_cause(exc)

    def _session(self, *, proxied: bool) -> aiohttp.ClientSession:
        if self._closed:
            raise SessionClosedError("the session is closed; make a new one")
        if proxied:
            # No guard: the only name to resolve is the proxy's own, which may be internal.
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
            headers={
                "Accept": "*/*",
                "Accept-Encoding": "identity",
                "User-Agent": "evolink-async",
            },
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
            trust_env=False,
        )

    def _stream(self, response: aiohttp.ClientResponse, hop: _Hop, asked: int) -> Stream:
        """The stream that belongs to *response*.

        Raises:
            DownloadError: *response* is not the result.
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
        resumes = response.headers.get("Accept-Ranges", "").strip().lower() != "none"
        return Stream(
            offset=offset,
            total=total,
            etag=_strong(response.headers.get("ETag")) if resumes else None,
            chunks=self._chunks(response.content, hop.shown),
        )

    async def _chunks(self, body: aiohttp.StreamReader, shown: str) -> AsyncGenerator[bytes, None]:
        timer = _StallTimer(self._stall_timeout, self._min_bytes)
        try:
            while data := await timer.wait_for(body):
                yield data
        except TimeoutError:
            raise TransientDownloadError(
                f"{shown} stalled: less than {timer.min_bytes} bytes in {timer.seconds:g} s "
                "arrived",
                url=shown,
            ) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as exc:
            # aiohttp raises RuntimeError for a connection that we closed ourselves.
            raise TransientDownloadError(
                f"{shown} broke off: {_words(exc)}", url=shown
            ) from _safe_cause(exc)


def _strong(etag: str | None) -> str | None:
    """*etag* if it is a strong one: a weak one does not guarantee the same bytes."""
    return etag if etag is not None and re.fullmatch(r'"[!#-~]{1,200}"', etag) else None


def _release(response: aiohttp.ClientResponse) -> None:
    """Keep the connection if the whole body was read, close it otherwise."""
    if response.content.at_eof():
        response.release()
    else:
        response.close()


# ---------------------------------------------------------------------------------------------
# Links


def _checked(url: str, *, loopback: bool) -> URL:
    """A link that may be fetched, as aiohttp sends it.

    Raises:
        ValueError: It must not be fetched; the message says why.
    """
    if len(url) > _MAX_URL:
        raise ValueError(f"the link has {len(url)} characters")
    # Some hosts leave the spaces in a link's path and query as they are.
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    try:
        parts = split_url(f"{scheme}://{authority}{slash}{path.replace(' ', '%20')}")
    except ValueError as exc:
        raise ValueError(f"the link is unusable: {exc}") from None
    host = parts.hostname or ""
    if parts.scheme != "https" and not (
        parts.scheme == "http" and loopback and is_loopback_host(host)
    ):
        raise ValueError("the link is not https")
    target = _encoded(parts)
    # The name that aiohttp connects to may be spelled differently in the link.
    host = target.raw_host or ""
    reason = internal_host_reason(host)
    if reason is not None and not (loopback and is_loopback_host(host)):
        raise ValueError(f"the link's host is {reason}")
    return target


def _encoded(parts: SplitResult) -> URL:
    """The link as aiohttp sends it; quoted parts are kept, because a signature may cover them."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port is None else f":{parts.port}"
    ascii_host = URL(f"{parts.scheme}://{host}{port}/").raw_authority
    safe = "/%:@!$&'()*+,;=~-._"
    path = quote(parts.path or "/", safe=safe)
    query = quote(parts.query, safe=f"{safe}?")
    return URL(urlunsplit((parts.scheme, ascii_host, path, query, "")), encoded=True)


def _target(response: aiohttp.ClientResponse, hop: _Hop) -> str:
    """The target of a redirect.

    Raises:
        DownloadError: It has none.
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
# Answers


def _check_status(status: int, shown: str, asked: int) -> None:
    if status == 200 or (status == 206 and asked):
        return
    if status in {403, 404, 410}:
        raise DownloadError(
            f"{shown}: the link has expired or is gone ({status}). Result links live 24 hours "
            "after the task completed; reading the task again gives the same links, so "
            "after that the picture has to be generated again",
            url=shown,
            status=status,
            expired=True,
        )
    if status == 416 and asked:
        raise TransientDownloadError(
            f"{shown}: cannot be resumed", url=shown, status=status, resumable=False
        )
    kind = TransientDownloadError if status in {408, 425, 429} or status >= 500 else DownloadError
    raise kind(f"{shown}: the host answered {status}", url=shown, status=status)


def _range_of(response: aiohttp.ClientResponse, shown: str, asked: int) -> tuple[int, int | None]:
    """Position of the first byte, and size of the whole result.

    Raises:
        TransientDownloadError: The answer is not the part that was asked for.
    """
    if response.status == 200:
        return 0, response.content_length
    match = re.fullmatch(
        r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)",
        response.headers.get("Content-Range", "").strip(),
    )
    if match is None or int(match[1]) != asked:
        raise TransientDownloadError(
            f"{shown}: the host sent another part than asked for",
            url=shown,
            status=response.status,
            resumable=False,
        )
    return asked, None if match[3] == "*" else int(match[3])


def _internal(exc: BaseException) -> str | None:
    """Why the resolver refused the host, None if *exc* has another cause."""
    inner = getattr(exc, "os_error", None)
    return str(inner) if isinstance(inner, _InternalAddressError) else None


def _words(exc: BaseException) -> str:
    """A message for *exc* without the link's query, which some of aiohttp's messages hold."""
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
