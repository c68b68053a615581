"""Results to disk: whole, of the type they are, under safe names, or not at all."""

from __future__ import annotations

import asyncio
import io
import struct
from pathlib import Path
from typing import Any

import pytest
from hostile_results import (
    Behaviour,
    HostileHost,
    cut,
    endless,
    png,
    ranged,
    raw,
    redirect,
    reply,
    silent,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from saved_results import PICTURE, TASK, contents, failure, fetch, saving

from evolink_async._results.fetch import ResultClient
from evolink_async._results.media import media_type
from evolink_async._results.save import MAX_BYTES, MAX_FILES, TransientDownloadError
from evolink_async.errors import DownloadError, SessionClosedError

# -- the ordinary case -----------------------------------------------------------------------


async def test_save(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A result is saved whole, in a folder made for it, readable as any new file is."""
    folder = tmp_path / "a" / "b"
    path = await fetch(client, host.url("/a.png", reply(PICTURE)), folder)
    assert path == folder / "x-1.png"
    assert contents(folder) == {"x-1.png": PICTURE}
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert path.stat().st_nlink == 1


async def test_save_all(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """All results of a task are saved, numbered in order, at the same time."""
    pictures = [png(1000 * k) for k in range(1, 5)]
    urls = [host.url(f"/{k}", reply(picture)) for k, picture in enumerate(pictures)]
    paths = await saving(client, tmp_path).save_all(urls)
    assert paths == tuple(tmp_path / f"{TASK}-{k}.png" for k in range(1, 5))
    assert [path.read_bytes() for path in paths] == pictures
    assert host.most_open > 1


async def test_large_file(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A file of many chunks, of unknown length, arrives whole."""
    body = png(5_000_000)
    path = await fetch(client, host.url("/a", reply(body, length=False)), tmp_path)
    assert path.read_bytes() == body


# -- what arrives ----------------------------------------------------------------------------


def pillow(kind: str, **given: Any) -> bytes:
    """A small picture of that kind, as Pillow writes it."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(file, kind, **given)
    return file.getvalue()


def box(name: bytes, *brands: bytes) -> bytes:
    """The first box of an ISO media file, and some data."""
    body = name + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(body) + 4) + body + bytes(100)


MEDIA = {
    "png": [pillow("PNG"), PICTURE + b"trailing"],
    "jpg": [pillow("JPEG"), pillow("JPEG", progressive=True), pillow("JPEG") + bytes(50)],
    "webp": [pillow("WEBP"), pillow("WEBP", lossless=True), pillow("WEBP") + b"x"],
    "gif": [pillow("GIF"), pillow("GIF") + b"\0\0"],
    "bmp": [pillow("BMP")],
    "tiff": [pillow("TIFF"), b"MM\0*" + bytes(80)],
    "avif": [box(b"ftyp", b"avif", b"mif1"), box(b"ftyp", b"mif1", b"avif")],
    "heic": [box(b"ftyp", b"heic", b"mif1"), box(b"ftyp", b"mif1", b"heic")],
    "mp4": [box(b"ftyp", b"isom", b"iso2"), box(b"ftyp", b"mp42"), box(b"ftyp", b"M4V ")],
    "mov": [box(b"ftyp", b"qt  ")],
    "m4a": [box(b"ftyp", b"M4A ")],
    "webm": [b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm" + bytes(80)],
    "mkv": [b"\x1a\x45\xdf\xa3\xa3B\x86\x81\x01B\x82\x88matroska" + bytes(80)],
    "ogg": [b"OggS\0\x02" + bytes(80)],
    "flac": [b"fLaC\0\0\0\x22" + bytes(80)],
    "wav": [b"RIFF\xff\xff\xff\xffWAVEfmt " + bytes(80)],
    "mp3": [b"ID3\x04\0\0" + bytes(80), b"\xff\xfb\x90\x64" + bytes(80)],
}


@pytest.mark.parametrize(
    ("extension", "body"), [(ext, body) for ext, bodies in MEDIA.items() for body in bodies]
)
async def test_extension_is_the_real_type(
    client: ResultClient, host: HostileHost, tmp_path: Path, extension: str, body: bytes
) -> None:
    """The extension is that of the bytes, whatever link and headers say."""
    headers = {
        "Content-Type": "application/x-msdownload",
        "Content-Disposition": 'attachment; filename="../../evil.exe"',
    }
    url = host.url("/%2e%2e/%2e%2e/evil.exe", reply(body, headers=headers))
    path = await fetch(client, url, tmp_path / "out")
    assert contents(tmp_path) == {f"out/x-1.{extension}": body}
    assert path.suffix == f".{extension}"


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><html><body>Please log in</body></html>" * 9,
        b"<html>",
        b'{"error": "no such file"}',
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"MZ\x90\0" + bytes(200),
        b"\x7fELF" + bytes(200),
        b"#!/bin/sh\nrm -rf ~\n",
        b"%PDF-1.7\n" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"BM is how this text begins, but a bitmap it is not, by its header.",
        b"GIF88a" + bytes(100),
        b"\x89PNG\n\x1a\n" + bytes(100),
        b"RIFF\0\0\0\0AVI " + bytes(100),
        b"\0\0\0\x20ftyp\0\0\0\0" + bytes(100),
        b"\x1a\x45\xdf\xa3" + bytes(100),
        b"\xff\xfe<\0h\0t\0m\0l\0>\0",
        b"\x1b[31mred alert\x1b]0;title\x07" * 5,
        b"x",
        bytes(1000),
    ],
)
async def test_not_a_picture(
    client: ResultClient, host: HostileHost, tmp_path: Path, body: bytes
) -> None:
    """A file that is no media file is not saved, whatever its name; the error quotes its start."""
    headers = {"Content-Type": "image/png"}
    error = await failure(client, host.url("/a.png", reply(body, headers=headers)), tmp_path)
    assert "begins with" in str(error)
    assert str(error).isprintable()
    assert len(host.hits) == 1


@given(st.binary(max_size=100))
def test_media_type_of_anything(head: bytes) -> None:
    """Any bytes have a known type or none."""
    assert media_type(head) in {None, *MEDIA}


@pytest.mark.parametrize(
    "body",
    [
        png(3000, end=False),
        PICTURE[:-1],
        PICTURE[:40],
        pillow("JPEG")[:-2],
        pillow("WEBP")[:-1],
        pillow("GIF")[:-1],
        b"",
    ],
)
async def test_unfinished_file(
    client: ResultClient, host: HostileHost, tmp_path: Path, body: bytes
) -> None:
    """A file without its end is not saved, even if its announced length is reached."""
    for length in (True, False):
        url = host.url("/a?sig=secret", reply(body, length=length))
        error = await failure(client, url, tmp_path, attempts=3)
        assert "secret" not in str(error) + error.url
    assert len(host.hits) == 6


async def test_unfinished_once(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """After a file without its end the download starts over."""
    etag = {"ETag": '"v1"'}
    url = host.url("/a", reply(PICTURE[:50], headers=etag, length=False), ranged(PICTURE))
    path = await fetch(client, url, tmp_path)
    assert path.read_bytes() == PICTURE
    assert "Range" not in host.hits[1].headers


async def test_endless_picture(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A picture that never ends is given up at the limit."""
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        first = PICTURE[:50] if not headers else b"40000000\r\n" + PICTURE[:50]
        error = await failure(
            client, host.url("/a", endless(first, headers)), tmp_path, max_bytes=3_000_000
        )
        assert "at most 3000000 bytes" in str(error)
    assert len(host.hits) == 2


async def test_endless_page(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A body that is no picture is given up after its first bytes."""
    first = b"<!DOCTYPE html><html><head><title>Not what you asked for</title></head>"
    assert "begins with" in str(await failure(client, host.url("/a", endless(first)), tmp_path))


async def test_limit(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """The limit is exact, and a body announced to be larger is not read."""
    size = len(PICTURE)
    for length in (True, False):
        url = host.url("/a", reply(PICTURE, length=length))
        await failure(client, url, tmp_path, max_bytes=size - 1)
        await fetch(client, url, tmp_path, max_bytes=size, overwrite=True)
    huge = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999\r\n\r\n" + PICTURE)
    error = await failure(client, host.url("/b", huge), tmp_path / "b")
    assert f"at most {MAX_BYTES} bytes" in str(error)
    assert len(host.hits_of("/b")) == 1
    assert MAX_BYTES == 64 * 1024 * 1024


# -- interruptions ---------------------------------------------------------------------------


async def test_resume(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A download that breaks off is resumed, as often as the attempts allow."""
    body = png(2_000_000)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    url = host.url("/a", ranged(body, after=600_000))
    path = await fetch(client, url, tmp_path, sleep=sleep)
    assert path.read_bytes() == body
    starts = [int(hit.headers.get("Range", "=0-")[:-1].partition("=")[2]) for hit in host.hits]
    assert starts == sorted(set(starts))
    assert len(starts) >= 3
    assert {hit.headers.get("If-Range") for hit in host.hits} == {None, '"v1"'}
    assert waits == [0.5, 1.0, 2.0, 4.0][: len(waits)]


@pytest.mark.parametrize("after", [0, 1, 7, 63, 64, 65, 1000])
async def test_resume_from_any_byte(
    client: ResultClient, host: HostileHost, tmp_path: Path, after: int
) -> None:
    """The file is complete wherever the download broke off."""
    url = host.url("/a", ranged(PICTURE, after=after), ranged(PICTURE))
    assert (await fetch(client, url, tmp_path)).read_bytes() == PICTURE


@pytest.mark.parametrize(
    ("headers", "then", "asked"),
    [
        ({}, reply(PICTURE), False),
        ({"ETag": 'W/"v1"'}, reply(PICTURE), False),
        ({"ETag": '"v1"', "Accept-Ranges": "none"}, ranged(PICTURE), False),
        ({"ETag": '"v1"'}, reply(PICTURE), True),
        ({"ETag": '"v0"'}, ranged(PICTURE), True),
    ],
)
async def test_start_over(
    client: ResultClient,
    host: HostileHost,
    tmp_path: Path,
    *,
    headers: dict[str, str],
    then: Behaviour,
    asked: bool,
) -> None:
    """Where the host cannot resume, or the result has changed, the download starts over."""
    url = host.url("/a", cut(png(2_000_000), 1_000_000, headers), then)
    assert (await fetch(client, url, tmp_path)).read_bytes() == PICTURE
    assert ("Range" in host.hits[1].headers) == asked


async def test_unasked_part(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A part that was not asked for is not appended."""
    size = len(PICTURE)
    part = reply(PICTURE[100:], 206, {"Content-Range": f"bytes 100-{size - 1}/{size}"})
    error = await failure(
        client, host.url("/a", ranged(PICTURE, 'W/"v1"', after=100, hang=True), part), tmp_path
    )
    assert error.status == 206


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 100-3999/4000", "ETag": '"v1"'},
        {"Content-Range": f"bytes 100-{len(PICTURE) - 1}/{len(PICTURE)}", "ETag": '"v2"'},
        {"Content-Range": f"bytes 99-{len(PICTURE) - 1}/{len(PICTURE)}", "ETag": '"v1"'},
        {},
    ],
)
async def test_part_of_something_else(
    client: ResultClient, host: HostileHost, tmp_path: Path, headers: dict[str, str]
) -> None:
    """A part of another version is not appended."""
    url = host.url(
        "/a",
        ranged(PICTURE, after=100, hang=True),
        reply(b"\xee" * (len(PICTURE) - 112) + PICTURE[-12:], 206, headers),
        reply(PICTURE),
    )
    assert (await fetch(client, url, tmp_path)).read_bytes() == PICTURE
    assert [hit.headers.get("Range") for hit in host.hits] == [None, "bytes=100-", None]


async def test_part_of_unknown_whole(
    client: ResultClient, host: HostileHost, tmp_path: Path
) -> None:
    """A part without tag and size must still have the announced total length."""
    headers = {"Content-Range": f"bytes 100-{len(PICTURE) - 1}/*"}
    short = reply(PICTURE[100:200], 206, {"Content-Range": "bytes 100-199/*"})
    rest = reply(PICTURE[200:], 206, {"Content-Range": f"bytes 200-{len(PICTURE) - 1}/*"})
    url = host.url("/a", ranged(PICTURE, after=100, hang=True), short, rest)
    assert (await fetch(client, url, tmp_path)).read_bytes() == PICTURE
    url = host.url("/b", ranged(PICTURE, after=100, hang=True), reply(PICTURE[100:], 206, headers))
    assert (await fetch(client, url, tmp_path, overwrite=True)).read_bytes() == PICTURE


async def test_attempts(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """After the last attempt its error is raised, with the link and the task."""
    url = host.url("/a?sig=secret", reply(b"", 503))
    error = await failure(client, url, tmp_path, attempts=3, task_id=TASK)
    assert len(host.hits) == 3
    assert (error.status, error.task_id, error.expired) == (503, TASK, False)
    assert "secret" not in str(error) + error.url
    host.url("/a", reply(b"", 500), reply(b"", 429), cut(PICTURE, 10), reply(PICTURE))
    await fetch(client, url, tmp_path)


async def test_stall_then_resume(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A host that stalls is asked again for the missing bytes."""
    head = f'HTTP/1.1 200 OK\r\nETag: "v1"\r\nContent-Length: {len(PICTURE)}\r\n\r\n'.encode()
    url = host.url("/a", silent(head + PICTURE[:500]), ranged(PICTURE))
    assert (await fetch(client, url, tmp_path)).read_bytes() == PICTURE
    assert host.hits[1].headers["Range"] == "bytes=500-"


async def test_expired(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """An expired link is not tried again, even if it expires during the download."""
    error = await failure(client, host.url("/a?s=secret", reply(b"", 403)), tmp_path, task_id=TASK)
    assert (error.expired, error.status, error.task_id) == (True, 403, TASK)
    assert len(host.hits) == 1
    url = host.url("/b", ranged(PICTURE, after=100), reply(b"", 403))
    assert (await failure(client, url, tmp_path)).expired


async def test_changes_host_on_the_way(
    client: ResultClient, host: HostileHost, tmp_path: Path
) -> None:
    """A redirect to an internal host is refused at any attempt."""
    url = host.url("/a", ranged(PICTURE, after=100), redirect("https://10.0.0.1/"))
    assert "private" in str(await failure(client, url, tmp_path))


async def test_cut_at_every_byte(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """An answer cut anywhere never leaves a file."""
    body = png(60)
    whole = b"HTTP/1.1 200 OK\r\n\r\n" + body
    for end in range(len(whole)):
        await failure(client, host.url("/a", raw(whole[:end])), tmp_path, attempts=1)
    assert (await fetch(client, host.url("/a", raw(whole)), tmp_path)).read_bytes() == body


# -- several ---------------------------------------------------------------------------------


async def test_one_of_several_fails(
    client: ResultClient, host: HostileHost, tmp_path: Path
) -> None:
    """The files that were saved stay, and the error lists them."""
    urls = [
        host.url("/1", reply(PICTURE)),
        host.url("/2", reply(b"", 410)),
        host.url("/3", reply(PICTURE)),
    ]
    with pytest.raises(DownloadError) as caught:
        await saving(client, tmp_path).save_all(urls)
    assert set(contents(tmp_path)) == {f"{TASK}-1.png", f"{TASK}-3.png"}
    message = str(caught.value)
    assert f"1 of 3 results of task {TASK} could not be saved" in message
    assert f"saved: {TASK}-1.png, {TASK}-3.png" in message
    assert (caught.value.expired, caught.value.task_id) == (True, TASK)
    assert caught.value.url.endswith("/2")


async def test_all_fail(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """If nothing was saved the error says so; a single result's error is its own."""
    urls = [host.url("/1", reply(b"", 410))] * 2
    with pytest.raises(DownloadError, match=r"2 of 2 .* \(saved: none\)"):
        await saving(client, tmp_path).save_all(urls)
    with pytest.raises(DownloadError, match=r"^http://127.0.0.1:[0-9]+/1: the link has expired"):
        await saving(client, tmp_path).save_all(urls[:1])


async def test_closed_while_saving(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A session closed during the download raises its own error, and no partial file stays."""
    urls = [host.url("/1", silent(b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE[:100]))] * 2
    task = asyncio.create_task(saving(client, tmp_path).save_all(urls))
    await host.arrived.wait()
    await client.aclose()
    with pytest.raises(SessionClosedError):
        await task
    assert contents(tmp_path) == {}


async def test_cancelling_all(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """Cancelling removes the unfinished files and keeps the finished ones."""
    urls = [host.url("/1", reply(PICTURE)), host.url("/2", silent(b"HTTP/1.1 200 OK\r\n\r\n"))]
    task = asyncio.create_task(saving(client, tmp_path).save_all(urls))
    for _ in range(200):
        if (tmp_path / f"{TASK}-1.png").exists():
            break
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(contents(tmp_path)) == {f"{TASK}-1.png"}


async def test_no_links(client: ResultClient, tmp_path: Path) -> None:
    """A task without results has nothing to save."""
    assert await saving(client, tmp_path / "out").save_all(()) == ()


async def test_too_many_links(client: ResultClient, tmp_path: Path) -> None:
    """A task with absurdly many links is refused before any is opened."""
    urls = ["https://10.0.0.1/"] * (MAX_FILES + 1)
    with pytest.raises(DownloadError, match="at most 100"):
        await saving(client, tmp_path / "out").save_all(urls)


async def test_hostile_task_id(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """An id such as a path stays inside the folder, within the length of a file name."""
    url = host.url("/a", reply(PICTURE))
    for task_id in ("../../../evil", "/etc/evil", "x" * 5000, "con", "\ud800"):
        (path,) = await saving(client, tmp_path / "out", task_id=task_id).save_all([url])
        assert path.parent == tmp_path / "out"
        assert path.read_bytes() == PICTURE
    assert {Path(name).parts[0] for name in contents(tmp_path)} == {"out"}


def test_transient_errors_are_download_errors() -> None:
    """A transient error is a download error with the same data."""
    error = TransientDownloadError(
        "broke off", url="https://h.example/", status=503, resumable=False
    )
    assert isinstance(error, DownloadError)
    assert (error.status, error.resumable) == (503, False)
