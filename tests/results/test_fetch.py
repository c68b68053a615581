"""Opening result links on hostile hosts."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest
from hostile_results import (
    HostileHost,
    cut,
    endless,
    png,
    ranged,
    raw,
    redirect,
    reply,
    silent,
    trickle,
)
from result_links import PICTURE, FixedResolver, fetch, interruption, refusal

from evolink_async._results.fetch import ResultClient
from evolink_async._results.save import TransientDownloadError
from evolink_async.errors import DownloadError, SessionClosedError


@pytest.fixture
async def client() -> AsyncIterator[ResultClient]:
    client = ResultClient(
        allow_loopback=True, connect_timeout=2.0, stall_timeout=0.2, min_rate=5000.0
    )
    yield client
    await client.aclose()


async def test_stream(client: ResultClient, host: HostileHost) -> None:
    """A stream has the facts of the headers and the bytes of the body."""
    headers = {"Content-Type": "image/png", "ETag": '"v1"', "Accept-Ranges": "bytes"}
    url = host.url("/a.png", reply(PICTURE, headers=headers))
    async with client.open(url) as stream:
        assert (stream.offset, stream.total, stream.etag) == (0, len(PICTURE), '"v1"')
        assert b"".join([chunk async for chunk in stream.chunks]) == PICTURE


async def test_resumed_stream(client: ResultClient, host: HostileHost) -> None:
    """A download is resumed at a byte if the host can do that and the result is the same."""
    url = host.url("/a.png", ranged(PICTURE))
    async with client.open(url, offset=30, etag='"v1"') as stream:
        assert (stream.offset, stream.total) == (30, len(PICTURE))
        assert b"".join([chunk async for chunk in stream.chunks]) == PICTURE[30:]
    assert host.hits[0].headers["Range"] == "bytes=30-"
    assert host.hits[0].headers["If-Range"] == '"v1"'
    async with client.open(url, offset=30, etag='"old"') as stream:
        assert stream.offset == 0


@pytest.mark.parametrize(
    ("etag", "ranges"),
    [
        *((tag, "bytes") for tag in ('W/"v1"', "v1", '"a b"', '"v1", "v2"', f'"{"x" * 300}"', "")),
        ('"v1"', "none"),
    ],
)
async def test_weak_etag(client: ResultClient, host: HostileHost, etag: str, ranges: str) -> None:
    """An entity tag is not used to resume if it does not promise the same bytes, or cannot be."""
    url = host.url("/a.png", reply(PICTURE, headers={"ETag": etag, "Accept-Ranges": ranges}))
    async with client.open(url) as stream:
        assert stream.etag is None


async def test_nothing_of_ours_is_sent(
    client: ResultClient,
    host: HostileHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A result host gets five headers, and no cookie, key or password whatever it tries."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    url = host.url("/a.png", reply(PICTURE, headers={"Set-Cookie": "track=me; Path=/"}))
    host.url("/moved", redirect(url))
    await fetch(client, url)
    await fetch(client, url)
    await fetch(client, host.url("/moved"))
    for _ in range(2):
        await fetch(client, url.replace("127.0.0.1", "localhost"))
    assert "Cookie" not in host.hits.pop().headers
    assert "Cookie" not in host.hits.pop().headers
    expected = {
        "Host": f"127.0.0.1:{host.port}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "User-Agent": "evolink-async",
    }
    assert [hit.headers for hit in host.hits] == [expected] * 4
    assert {hit.method for hit in host.hits} == {"GET"}


async def test_signed_link_stays_as_it_is(client: ResultClient, host: HostileHost) -> None:
    """The quoting of a link is kept, because a signature may cover it; spaces are quoted."""
    target = "/a%2Fb/%41+c%20d;x=1,2/~e.png?Expires=1&Signature=a%2Bb+c%3D%3d&x=%7e/?:@"
    for sent, given in (
        (target, target),
        ("/%C3%BC/a%20b?q=%C3%A9&r=a%20b", "/\u00fc/a b?q=\u00e9&r=a b#part"),
        ("/", ""),
        ("/?x=1", "?x=1"),
    ):
        await refusal(client, f"http://127.0.0.1:{host.port}{given}")
        assert host.hits[-1].target == sent


async def test_redirects(client: ResultClient, host: HostileHost) -> None:
    """Up to five redirects of any kind are followed, relative ones too."""
    host.url("/5", reply(PICTURE))
    for step, (status, location) in enumerate(
        (
            (301, "/1"),
            (302, host.url("/2")),
            (303, "3"),
            (307, f"//127.0.0.1:{host.port}/4"),
            (308, "./5?q"),
        )
    ):
        host.url(f"/{step}", redirect(location, status))
    assert await fetch(client, host.url("/0")) == PICTURE
    error = await refusal(client, host.url("/loop", redirect("/loop")))
    assert "more than 5 redirects" in str(error)
    assert len(host.hits_of("/loop")) == 6


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/x",
        "https://10.0.0.1/x",
        "//169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "https://metadata.google.internal/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://0xa000001/",
        "https://127.1/",
        "https://2130706433/",
        "https://\uff11\uff10.0.0.1/",
        "https://10.0.0.\ufe0f1/",
        "https://10.0.0.1\\@example.com/",
        "https://example.com\\@10.0.0.1/",
        "https://user:pass@example.com/",
        "https://intranet/",
        "http://example.com/x",
        "HTTP://EXAMPLE.COM/x",
        "ht\ttps://10.0.0.1/",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://127.0.0.1/x",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "gopher://127.0.0.1/",
        "https://[::1/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https:///x",
        "https://\udcff.example/",
        "https://xn--/",
        "https://" + "a" * 70 + ".example/",
        "https://[fe80::1%25eth0]/",
        "",
    ],
)
async def test_bad_redirect(client: ResultClient, host: HostileHost, location: str) -> None:
    """A redirect anywhere but to a public https host, or within this machine, is not followed."""
    error = await refusal(client, host.url("/moved?sig=secret", redirect(location)))
    assert "secret" not in str(error)
    assert "pass" not in error.url.replace("passwd", "")
    assert len(host.hits) == 1


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "/x.png",
        "../../etc/passwd",
        "file:///etc/passwd",
        "ftp://example.com/x",
        "http://example.com/x",
        "https://127.0.0.1/x",
        "https://localhost/x",
        "http://localhost/x",
        "http://127.0.0.1/x",
        "http://[::1]/x",
        "https://10.0.0.1/x",
        "https://[fd00::1]/x",
        "https://nas.local/x",
        "https://\u24dbocalhost/x",
        "https://user:secret@example.com/x",
        "https://example.com/\r\nHost: evil",
        "https://example.com\x00.evil.example/",
        "https://example.com/" + "a" * 9000,
        "https://\u2100.example/",
    ],
)
async def test_bad_link(url: str) -> None:
    """A link anywhere but to a public https host is not opened, nor is its user info repeated."""
    client = ResultClient(resolver=FixedResolver("10.0.0.1"))
    error = await refusal(client, url)
    assert "secret" not in str(error) + error.url
    assert all(c.isprintable() for c in str(error))
    await client.aclose()


async def test_loopback_only_from_loopback(host: HostileHost) -> None:
    """A link to this machine is opened where that is allowed; a name that leads here is not."""
    resolver = FixedResolver("127.0.0.1")
    client = ResultClient(allow_loopback=True, resolver=resolver)
    url = host.url("/a.png", reply(PICTURE))
    assert await fetch(client, url) == PICTURE
    assert await fetch(client, url.replace("127.0.0.1", "localhost")) == PICTURE
    assert resolver.asked == ["localhost"]
    error = await refusal(client, f"https://public.example:{host.port}/a.png")
    assert "resolves to 127.0.0.1, a loopback address" in str(error)
    await client.aclose()
    assert resolver.closed


@pytest.mark.parametrize(
    "answer",
    [
        ["10.0.0.1"],
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a00:1"],
        ["fe80::1%eth0"],
        ["100.64.0.1", "192.168.0.1"],
    ],
)
async def test_name_of_an_internal_address(answer: list[str]) -> None:
    """A public name that resolves to an internal address is never connected to."""
    client = ResultClient(resolver=FixedResolver(answer))
    error = await refusal(client, "https://public.example/a.png?sig=secret")
    assert f"resolves to {answer[0]}, a" in str(error)
    assert "secret" not in str(error)
    await client.aclose()


async def test_localhost_elsewhere(host: HostileHost) -> None:
    """``localhost`` that resolves to another machine is not this machine."""
    client = ResultClient(allow_loopback=True, resolver=FixedResolver("8.8.8.8"))
    error = await refusal(client, f"http://localhost:{host.port}/a.png")
    assert "not this machine" in str(error)
    await client.aclose()


async def test_mixed_answer() -> None:
    """Of a name's addresses only the public ones are connected to."""
    resolver = FixedResolver(["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1"])
    client = ResultClient(resolver=resolver)
    session = client._session(proxied=False)
    assert isinstance(session.connector, aiohttp.TCPConnector)
    found = await session.connector._resolve_host("public.example", 443)
    assert {entry["host"] for entry in found} == {"8.8.8.8", "2606:4700::1"}
    await client.aclose()


async def test_no_such_name() -> None:
    """A name that does not resolve may do so the next time."""
    client = ResultClient(resolver=FixedResolver([]))
    error = await interruption(client, "https://public.example/a.png?sig=secret")
    assert "does not answer" in str(error)
    assert "secret" not in str(error)
    await client.aclose()


async def test_redirect_from_outside_to_this_machine(host: HostileHost) -> None:
    """Only a link on this machine may lead on to this machine."""
    client = ResultClient(allow_loopback=True)
    outside = client._hop("https://example.com/a", None)
    with pytest.raises(DownloadError, match=r"redirected from https://example.com/a"):
        client._hop(host.url("/a.png"), outside)
    assert client._hop(host.url("/a.png"), client._hop(host.url("/"), None)).url.port == host.port
    await client.aclose()


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_expired(client: ResultClient, host: HostileHost, status: int) -> None:
    """The error of an expired link says how long links live, and what to do."""
    error = await refusal(client, host.url("/a.png?sig=secret", reply(b"<Error/>", status)))
    assert error.expired
    assert error.status == status
    assert "24 hours" in str(error)
    assert error.url == f"http://127.0.0.1:{host.port}/a.png"


@pytest.mark.parametrize("status", [400, 401, 451, 204, 206, 300, 304, 416])
async def test_final_status(client: ResultClient, host: HostileHost, status: int) -> None:
    """Another status without a result is final."""
    error = await refusal(client, host.url("/a.png", reply(b"", status)))
    assert (error.status, error.expired) == (status, False)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
async def test_passing_status(client: ResultClient, host: HostileHost, status: int) -> None:
    """A transient status is worth another attempt."""
    error = await interruption(client, host.url("/a.png", reply(b"", status)))
    assert (error.status, error.resumable) == (status, True)


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 0-99/100",
        "bytes 31-99/100",
        "bytes */100",
        "bytes 30-x/100",
        "30-99/100",
        "bytes 30-99/" + "9" * 30,
        "bytes \u0663\u0660-99/100",
    ],
)
async def test_lying_range(client: ResultClient, host: HostileHost, content_range: str) -> None:
    """A part that is not the one asked for is not resumable."""
    url = host.url("/a.png", reply(PICTURE, 206, {"Content-Range": content_range}))
    assert not (await interruption(client, url, offset=30, etag='"v1"')).resumable


async def test_range_beyond_the_end(client: ResultClient, host: HostileHost) -> None:
    """If the host has no such part, the download starts over."""
    url = host.url("/a.png", reply(b"", 416))
    assert not (await interruption(client, url, offset=30, etag='"v1"')).resumable


async def test_range_of_unknown_total(client: ResultClient, host: HostileHost) -> None:
    """A part of a whole of unknown size is fine."""
    async with client.open(
        host.url("/a.png", ranged(PICTURE, total="*")), offset=30, etag='"v1"'
    ) as stream:
        assert (stream.offset, stream.total) == (30, None)


async def test_compressed(client: ResultClient, host: HostileHost) -> None:
    """A result compressed unasked, a bomb perhaps, is refused and never unpacked."""
    bomb = gzip.compress(bytes(10_000_000))
    error = await refusal(
        client, host.url("/a.png", reply(bomb, headers={"Content-Encoding": "gzip"}))
    )
    assert "compressed" in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100,
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-",
    ],
)
async def test_broken_http(client: ResultClient, host: HostileHost, answer: bytes) -> None:
    """An incomplete HTTP answer is a transient error, which does not show the link's query."""
    error = await interruption(client, host.url("/a.png?sig=secret", raw(answer)))
    while error is not None:
        assert "secret" not in f"{error} {error!r}"
        error = error.__cause__  # type: ignore[assignment]  # the chain a traceback shows


async def test_every_cut(client: ResultClient, host: HostileHost) -> None:
    """An answer cut at any byte is a transient error, never a result."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 140\r\n\r\n"
    whole = head + PICTURE[:140]
    for end in range(len(whole)):
        await interruption(client, host.url("/a.png", raw(whole[:end])))
    assert await fetch(client, host.url("/a.png", raw(whole))) == PICTURE[:140]


async def test_refused_connection(client: ResultClient) -> None:
    """A refused connection is a transient error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "does not answer" in str(await interruption(client, f"http://127.0.0.1:{port}/a.png"))


async def test_no_tls(host: HostileHost) -> None:
    """An https link is never answered over plain http."""
    client = ResultClient(allow_loopback=True, connect_timeout=0.1)
    url = host.url("/a.png", reply(PICTURE)).replace("http:", "https:")
    await interruption(client, url)
    assert not host.hits
    await client.aclose()


@pytest.mark.parametrize(
    "behaviour",
    [
        silent(),
        silent(b"HTTP/1.1 200 OK\r\n"),
        trickle(b"HTTP/1.1 200 OK\r\nX: "),
        trickle(b"", b"\r\n"),
    ],
)
async def test_silent_head(host: HostileHost, behaviour: object) -> None:
    """A host that never finishes its headers is given up, whatever it sends."""
    client = ResultClient(allow_loopback=True, connect_timeout=0.05, stall_timeout=0.05)
    error = await interruption(client, host.url("/a.png", behaviour))  # type: ignore[arg-type]  # parametrised
    assert "does not answer" in str(error)
    await client.aclose()


@pytest.mark.parametrize(
    "behaviour",
    [
        silent(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nabc"),
        silent(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"),
        trickle(b"HTTP/1.1 200 OK\r\n\r\n"),
        trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
async def test_stall(client: ResultClient, host: HostileHost, behaviour: object) -> None:
    """A body slower than the minimum rate is broken off, also if it never quite stops."""
    error = await interruption(client, host.url("/a.png", behaviour))  # type: ignore[arg-type]  # parametrised
    assert "stalled" in str(error)
    assert "1000 bytes in 0.2 s" in str(error)


async def test_fast_enough(host: HostileHost) -> None:
    """A body faster than the minimum rate may go on for many windows."""
    client = ResultClient(allow_loopback=True, stall_timeout=0.05, min_rate=20.0)
    got = 0
    async with (
        client.open(host.url("/a.png", trickle(b"HTTP/1.1 200 OK\r\n\r\n"))) as stream,
        aclosing(stream.chunks) as chunks,
    ):
        async for chunk in chunks:
            got += len(chunk)
            if got > 30:
                break
    assert got > 30
    await client.aclose()


async def test_slow_reader(client: ResultClient, host: HostileHost) -> None:
    """The time a reader takes between chunks does not count as a stall."""
    body = png(3_000_000)
    got = 0
    async with client.open(host.url("/a.png", reply(body))) as stream:
        async for chunk in stream.chunks:
            if got < 500_000:
                time.sleep(0.05)  # noqa: ASYNC251 - a reader that blocks the loop, too
            got += len(chunk)
    assert got == len(body)


async def test_endless_body_is_left(client: ResultClient, host: HostileHost) -> None:
    """Leaving a stream early closes its connection."""
    async with client.open(host.url("/a.png", endless(PICTURE))) as stream:
        async for _ in stream.chunks:
            break
    for _ in range(100):
        if host.open_now == 0:
            break
        await asyncio.sleep(0.01)
    assert host.open_now == 0


async def test_redirect_with_endless_body(client: ResultClient, host: HostileHost) -> None:
    """The body of a redirect is not read."""
    forever = endless(b"x" * 100, {"Location": "/a.png"}, 302)
    host.url("/a.png", reply(PICTURE))
    assert await fetch(client, host.url("/moved", forever)) == PICTURE


async def test_connections_are_bounded(host: HostileHost) -> None:
    """No more results are open at the same time than asked for; the others wait."""
    client = ResultClient(allow_loopback=True, max_connections=3)
    url = host.url("/a.png", reply(png(200_000)))
    results = await asyncio.gather(*(fetch(client, url) for _ in range(20)))
    assert results == [png(200_000)] * 20
    assert host.most_open <= 3
    await client.aclose()


async def test_cancelled_waiter_gives_its_place_back(host: HostileHost) -> None:
    """A caller cancelled while waiting or reading leaves nothing open."""
    client = ResultClient(allow_loopback=True, max_connections=1)
    stuck = host.url("/stuck", silent(b"HTTP/1.1 200 OK\r\n\r\n"))
    tasks = [asyncio.create_task(fetch(client, stuck)) for _ in range(3)]
    await host.arrived.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await fetch(client, host.url("/a.png", reply(PICTURE))) == PICTURE
    await client.aclose()


async def test_close(client: ResultClient, host: HostileHost) -> None:
    """A closed client breaks off open streams and opens no more; closing twice is fine."""
    async with client.open(host.url("/a.png", cut(PICTURE, 50))) as stream:
        await client.aclose()
        with pytest.raises(TransientDownloadError):
            _ = [chunk async for chunk in stream.chunks]
    await client.aclose()
    with pytest.raises(SessionClosedError):
        await fetch(client, host.url("/a.png"))
