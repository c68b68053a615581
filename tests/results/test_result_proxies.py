"""Result links by way of the proxies of the environment."""

from __future__ import annotations

import pytest
from hostile_results import HostileHost, reply
from result_links import PICTURE, FixedResolver, fetch, interruption, refusal

from evolink_async._results.fetch import ResultClient
from evolink_async.errors import DownloadError


async def test_proxy(host: HostileHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's proxy is used, with its password; its own host may be internal."""
    monkeypatch.setenv("https_proxy", f"http://me:pa%3Ass@127.0.0.1:{host.port}")
    host.url("pictures.example:443", reply(b"", 407))
    client = ResultClient()
    error = await interruption(client, "https://pictures.example/a.png?sig=secret")
    assert "the proxy answered 407" in str(error)
    assert "secret" not in f"{error} {error.__cause__!r}"
    (hit,) = host.hits
    assert (hit.method, hit.target) == ("CONNECT", "pictures.example:443")
    assert hit.headers["Proxy-Authorization"] == "Basic bWU6cGE6c3M="
    await refusal(client, "https://10.0.0.1/a.png")
    assert len(host.hits) == 1
    await interruption(client, "https://pictures.example/b.png")
    assert len(host.hits) == 2
    await client.aclose()


@pytest.mark.parametrize(
    ("proxy", "no_proxy", "used"),
    [
        ("http://127.0.0.1:{port}", "", True),
        ("127.0.0.1:{port}", "", True),
        ("http://127.0.0.1:{port}", "pictures.example", False),
        ("http://127.0.0.1:{port}", "*", False),
    ],
)
async def test_proxy_settings(
    host: HostileHost, monkeypatch: pytest.MonkeyPatch, proxy: str, no_proxy: str, *, used: bool
) -> None:
    """A proxy may lack its scheme, and is bypassed where ``no_proxy`` says so."""
    monkeypatch.setenv("https_proxy", proxy.format(port=host.port))
    monkeypatch.setenv("no_proxy", no_proxy)
    client = ResultClient(resolver=FixedResolver("10.0.0.1"))
    with pytest.raises(DownloadError):
        await fetch(client, "https://pictures.example/a.png")
    assert bool(host.hits) == used
    await client.aclose()


async def test_proxy_is_not_for_this_machine(
    client: ResultClient, host: HostileHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine is reached directly, whatever the environment says."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert await fetch(client, host.url("/a.png", reply(PICTURE))) == PICTURE


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:99999", "http://"])
async def test_unusable_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """The error for a proxy of an unknown kind names the proxy."""
    monkeypatch.setenv("https_proxy", proxy)
    client = ResultClient()
    assert "proxy" in str(await refusal(client, "https://pictures.example/a.png?sig=secret"))
    await client.aclose()
