"""Each step of saving on the disk: names, flushes, full disks and cancellation."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile_results import Hit, HostileHost, png, ranged, reply, silent
from saved_results import PICTURE, TASK, contents, failure, fetch

from evolink_async._results import save as saving
from evolink_async._results.fetch import ResultClient
from evolink_async.errors import DownloadError

HAS_DEV_FULL = Path("/dev/full").exists()


@pytest.mark.parametrize("name", ["x-1.png", "x-1.jpg", "x-1.mp4"])
async def test_existing_file(
    client: ResultClient, host: HostileHost, tmp_path: Path, name: str
) -> None:
    """A file of that name and any extension stays as it is; not a byte is asked for."""
    (tmp_path / name).write_bytes(b"precious")
    error = await failure(client, host.url("/a", reply(PICTURE)), tmp_path)
    assert error.path == tmp_path / name
    assert "overwrite=True" in str(error)
    assert not host.hits


async def test_overwrite(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """With overwrite=True an existing file is replaced, but only by a complete one."""
    (tmp_path / "x-1.png").write_bytes(b"precious")
    await failure(client, host.url("/a", reply(PICTURE[:-1])), tmp_path, overwrite=True)
    path = await fetch(client, host.url("/a", reply(PICTURE)), tmp_path, overwrite=True)
    assert contents(tmp_path) == {path.name: PICTURE}


async def test_file_made_meanwhile(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A file that appears while downloading is not replaced."""

    async def race(_: Hit, writer: asyncio.StreamWriter) -> None:
        (tmp_path / "x-1.png").write_bytes(b"precious")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE)
        await writer.drain()

    with pytest.raises(DownloadError, match="overwrite=True"):
        await fetch(client, host.url("/a", race), tmp_path)
    assert contents(tmp_path) == {"x-1.png": b"precious"}


@pytest.mark.parametrize("overwrite", [False, True])
async def test_symbolic_link(
    client: ResultClient, host: HostileHost, tmp_path: Path, *, overwrite: bool
) -> None:
    """A symbolic link under the final name is never written through."""
    outside = tmp_path / "outside"
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x-1.png").symlink_to(outside)
    url = host.url("/a", reply(PICTURE))
    if overwrite:
        assert not (await fetch(client, url, folder, overwrite=True)).is_symlink()
    else:
        await failure(client, url, folder)
    assert not outside.exists()


async def test_folder_in_the_way(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A folder of the file's name is an error that says so."""
    (tmp_path / "x-1.png").mkdir()
    url = host.url("/a", reply(PICTURE))
    assert "folder" in str(await failure(client, url, tmp_path, overwrite=True))
    assert "exists" in str(await failure(client, url, tmp_path))


async def test_folder_is_a_file(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A file where the folder should be, or above it, is an error that says so."""
    (tmp_path / "file").touch()
    url = host.url("/a", reply(PICTURE))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DownloadError, match="is a file, not a folder"):
            await fetch(client, url, folder)
    with pytest.raises(DownloadError, match="cannot be the name of a folder"):
        await fetch(client, url, tmp_path / "\0")
    assert not host.hits


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_folder_not_writable(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """A folder that may not be written to is an error that says so."""
    os.chmod(tmp_path, 0o500)  # noqa: PTH101 - quick, and not worth a thread
    error = await failure(client, host.url("/a", reply(PICTURE)), tmp_path)
    assert "no permission" in str(error)
    assert error.path == tmp_path


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, os.strerror(errno.EIO)),
        (None, "OSError"),
    ],
)
@pytest.mark.parametrize("where", ["open", "fsync"])
async def test_disk_errors(
    client: ResultClient,
    host: HostileHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    number: int | None,
    words: str,
    where: str,
) -> None:
    """A disk error is a download error that names it, and leaves nothing behind."""

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, None if number is None else os.strerror(number))

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(DownloadError, match=words) as caught:
        await fetch(client, host.url("/a", reply(PICTURE)), tmp_path, task_id=TASK)
    monkeypatch.undo()
    assert contents(tmp_path) == {}
    assert (caught.value.path, caught.value.task_id) == (tmp_path, TASK)


@pytest.mark.skipif(not HAS_DEV_FULL, reason="needs a disk that is always full")
async def test_full_disk(
    client: ResultClient, host: HostileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up during the download is reported as full."""
    real = os.open

    def full(path: Path, flags: int, mode: int = 0o777) -> int:
        return (
            real("/dev/full", os.O_RDWR) if str(path).endswith(".part") else real(path, flags, mode)
        )

    monkeypatch.setattr(os, "open", full)
    error = await failure(client, host.url("/a", reply(png(2_000_000))), tmp_path)
    assert "the disk is full" in str(error)


async def test_file_system_without_links(
    client: ResultClient, host: HostileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links the file is saved as well, and nothing is replaced."""

    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    url = host.url("/a", reply(PICTURE))
    await fetch(client, url, tmp_path)
    assert contents(tmp_path) == {"x-1.png": PICTURE}

    async def race(_: Hit, writer: asyncio.StreamWriter) -> None:
        (tmp_path / "race" / "x-1.png").write_bytes(b"precious")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE)
        await writer.drain()

    with pytest.raises(DownloadError, match="overwrite=True"):
        await fetch(client, host.url("/a", race), tmp_path / "race")
    assert contents(tmp_path / "race") == {"x-1.png": b"precious"}

    def no_rename(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", no_rename)
    await failure(client, url, tmp_path / "broken")


async def test_folder_that_cannot_be_flushed(
    client: ResultClient, host: HostileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot flush a folder does not make a saved file an error."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 - a link in /proc
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    await fetch(client, host.url("/a", reply(PICTURE)), tmp_path)
    monkeypatch.delattr(os, "O_DIRECTORY")
    await fetch(client, host.url("/a"), tmp_path / "b")


async def test_order_of_the_last_steps(
    client: ResultClient, host: HostileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is flushed before the rename, and the folder before the path is returned."""
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def spy(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any, **given: Any) -> None:
            steps.append(name)
            call(*args, **given)

        return act

    monkeypatch.setattr(os, "fsync", spy("fsync", fsync))
    monkeypatch.setattr(os, "link", spy("link", link))
    await fetch(client, host.url("/a", reply(PICTURE)), tmp_path)
    assert steps == ["fsync", "link", "fsync"]


async def test_temporary_name(client: ResultClient, host: HostileHost, tmp_path: Path) -> None:
    """While it arrives, a file has a hidden, unguessable name in the same folder."""
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    stuck = host.url("/a", silent(head + png(1_000_000)))
    task = asyncio.create_task(fetch(client, stuck, tmp_path))
    await host.arrived.wait()
    (name,) = contents(tmp_path)
    assert re.fullmatch(r"\.x-1\.[0-9a-f]{16}\.part", name)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert contents(tmp_path) == {}


async def test_temporary_name_taken(
    client: ResultClient, host: HostileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link or file planted under the temporary name is not written to."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".x-1.{'0' * 16}.part").symlink_to(tmp_path / "outside")
    with pytest.raises(DownloadError):
        await fetch(client, host.url("/a", reply(PICTURE)), tmp_path / "out")
    assert not (tmp_path / "outside").exists()
    assert (tmp_path / "out" / f".x-1.{'0' * 16}.part").is_symlink()
    (tmp_path / f".x-1.{'0' * 16}.part").write_bytes(b"planted")
    await failure(client, host.url("/a"), tmp_path)


@pytest.mark.parametrize("step", ["mkdir", "open", "write", "fsync", "link"])
async def test_cancelled_in_a_thread(
    client: ResultClient,
    host: HostileHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """Cancelled at any step on the disk, it leaves the complete file or nothing."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    reached, go_on = asyncio.Event(), threading.Event()
    owner: Any = {"mkdir": Path, "write": saving._TemporaryFile}.get(step, os)
    real = getattr(owner, step)

    def slow(*args: Any, **given: Any) -> Any:
        if not reached.is_set():
            loop.call_soon_threadsafe(reached.set)
            go_on.wait(5)
        return real(*args, **given)

    monkeypatch.setattr(owner, step, slow)
    folder = tmp_path / "out"
    task = asyncio.create_task(fetch(client, host.url("/a", reply(PICTURE)), folder))
    await reached.wait()
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0)
    loop.call_later(0.02, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    await loop.shutdown_default_executor()
    assert contents(tmp_path) in ({}, {"out/x-1.png": PICTURE})
    assert (step in {"fsync", "link"}) == bool(contents(tmp_path))


async def test_cancelled_at_any_moment(
    client: ResultClient, host: HostileHost, tmp_path: Path
) -> None:
    """Cancelled after any number of turns of the loop, no temporary file stays."""
    for turns in range(0, 120, 3):
        url = host.url("/a", ranged(PICTURE, after=900))
        task = asyncio.create_task(fetch(client, url, tmp_path / str(turns)))
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
    found = contents(tmp_path)
    assert {Path(name).name for name in found} <= {"x-1.png"}
    assert set(found.values()) <= {PICTURE}


def test_nothing_is_written_after_giving_up(tmp_path: Path) -> None:
    """A thread that runs after the file was discarded leaves nothing behind."""
    late = saving._TemporaryFile(tmp_path / "late", stem="x", overwrite=False)
    late.discard()
    late.create()
    assert not (tmp_path / "late").exists()
    partial = saving._TemporaryFile(tmp_path, stem="x", overwrite=False)
    partial.create()
    partial.discard()
    partial.write(PICTURE, rewind=False)
    assert partial.publish("png", PICTURE[:64]) is None
    assert contents(tmp_path) == {}
