"""Opening result links: a resolver with fixed answers, and the errors that links give."""

from __future__ import annotations

import socket
from contextlib import aclosing

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hostile_results import png

from evolink_async._results.fetch import ResultClient
from evolink_async._results.save import TransientDownloadError
from evolink_async.errors import DownloadError

PICTURE = png()


class FixedResolver(AbstractResolver):
    """A resolver with the answers that the test gives it."""

    def __init__(self, *answers: str | list[str]) -> None:
        self.answers = [[a] if isinstance(a, str) else a for a in answers]
        self.asked: list[str] = []
        self.closed = False

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,  # noqa: ARG002 - aiohttp's signature
    ) -> list[ResolveResult]:
        self.asked.append(host)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not found:
            raise OSError(None, "no such name")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in found
        ]

    async def close(self) -> None:
        self.closed = True


async def fetch(
    client: ResultClient, url: str, *, offset: int = 0, etag: str | None = None
) -> bytes:
    async with (
        client.open(url, offset=offset, etag=etag) as stream,
        aclosing(stream.chunks) as chunks,
    ):
        return b"".join([chunk async for chunk in chunks])


async def refusal(client: ResultClient, url: str) -> DownloadError:
    """The error of a link that must never be opened."""
    with pytest.raises(DownloadError) as caught:
        await fetch(client, url)
    assert not isinstance(caught.value, TransientDownloadError)
    return caught.value


async def interruption(
    client: ResultClient, url: str, *, offset: int = 0, etag: str | None = None
) -> TransientDownloadError:
    """The error of a link that may work at the next attempt."""
    with pytest.raises(TransientDownloadError) as caught:
        await fetch(client, url, offset=offset, etag=etag)
    return caught.value
