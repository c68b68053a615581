"""Saves results as files, each under a temporary name until it is complete and on disk.

A picture's file name is made here: the k-th result of a task is called
``<stem>-<k>.<ext>``. The stem is the task's id, or what ``name=`` or a batch gives, made safe
by `_files.safe_name`; the extension comes from the first bytes of the file. Neither the link
nor a header has a say in it.

Knows no HTTP: a link is opened by a function that yields a `Stream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from attrs import define, field, frozen

from evolink_async._files import (
    MAX_NAME,
    CannotSaveError,
    already_exists,
    rename,
    safe_name,
    sync_folder,
)
from evolink_async._hosts import shown_url
from evolink_async._results.media import EXTENSIONS, is_whole, media_type
from evolink_async._text import printable
from evolink_async.errors import DownloadError

__all__ = ["MAX_BYTES", "MAX_FILES", "BeforeRename", "Saving", "Stream", "TransientDownloadError"]

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 64 * 1024 * 1024
"""Default limit of one file, in bytes: ten uncompressed 1440x1440 pictures."""
MAX_FILES: Final = 100
"""Links of one task that are opened; the API's page allows 4 pictures."""

_HEAD_BYTES: Final = 64
"""Bytes from which `media_type` knows the type of a file."""
_WRITE_BYTES: Final = 512 * 1024
"""Bytes that are collected before they are written."""


class TransientDownloadError(DownloadError):
    """A download failed in a way that another attempt may mend.

    It stays inside this folder: `Saving` tries again, and in the end raises `DownloadError`.

    Attributes:
        resumable: False if the next attempt must start at the first byte.
    """

    def __init__(self, message: str, *, resumable: bool = True, **data: Any) -> None:
        super().__init__(message, **data)
        self.resumable = resumable


@frozen(kw_only=True)
class Stream:
    """A result whose download has begun.

    Attributes:
        offset: Position of the first byte; 0 if the host sends the whole result.
        total: Size of the whole result in bytes, None if unknown.
        etag: Strong entity tag to resume with, None if the host cannot resume.
        chunks: The bytes, in pieces as they arrive. Raises `TransientDownloadError` if the
            connection breaks, or is slower than the minimum rate.
    """

    offset: int
    total: int | None
    etag: str | None
    chunks: AsyncGenerator[bytes, None]


OpenResult = Callable[[str, int, str | None], contextlib.AbstractAsyncContextManager[Stream]]
"""Opens a link, at an offset if the host can resume and the result still has the entity tag."""

BeforeRename = Callable[[Path, Path], None]
"""Called with the temporary path of a complete file and the name it gets next."""


# ---------------------------------------------------------------------------------------------
# Saving


@frozen(kw_only=True)
class Saving:
    """Saves the results of a task as ``<folder>/<stem>-<k>.<ext>``, k from 1.

    The extension is that of the bytes that arrived. Under its final name a file is always
    complete: the rename is the last step.

    Attributes:
        open_result: Opens a link.
        folder: Where to save; made if missing.
        task_id: The task.
        attempts: Attempts at each file. The next one resumes the download if the host can do
            that and the result is still the same, otherwise it starts over.
        wait_after: Seconds to wait after that many failures.
        sleep: Waits that long.
        stem: How the names begin, the task's id if None; made safe by `safe_name`.
        existing: Files that were saved earlier, by k; they are not downloaded.
        overwrite: Whether an existing file may be replaced.
        before_rename: Called, in a thread, before a complete file gets its final name.
        retry_expired: Whether to try again if a link seems to have expired; for links that
            are known to be new.
        max_bytes: Largest file, in bytes, that is accepted.
    """

    open_result: OpenResult
    folder: Path
    task_id: str
    attempts: int
    wait_after: Callable[[int], float]
    sleep: Callable[[float], Awaitable[object]]
    stem: str | None = None
    existing: Mapping[int, Path] = field(factory=dict)
    overwrite: bool = False
    before_rename: BeforeRename | None = None
    retry_expired: bool = False
    max_bytes: int = MAX_BYTES

    async def save_all(self, urls: Sequence[str]) -> tuple[Path, ...]:
        """Save what is behind *urls*, all at the same time; returns the paths.

        A link that fails does not stop the others.

        Raises:
            DownloadError: The first failure; it says which files were saved, and those stay.
        """
        if len(urls) > MAX_FILES:
            raise DownloadError(
                f"task {printable(self.task_id)} has {len(urls)} links; at most {MAX_FILES} are "
                "followed",
                url="",
                task_id=self.task_id,
            )
        wanted = {k: url for k, url in enumerate(urls, 1) if k not in self.existing}
        outcomes = await asyncio.gather(
            *(self.save(url, k) for k, url in wanted.items()), return_exceptions=True
        )
        all_ = {**self.existing, **dict(zip(wanted, outcomes, strict=True))}
        return _all_saved([all_[k] for k in range(1, len(urls) + 1)], self.task_id)

    async def save(self, url: str, k: int) -> Path:
        """Save what is behind *url* as the *k*-th result; returns its path.

        Raises:
            DownloadError: It could not be saved; nothing is left behind.
        """
        stem = safe_name(self.task_id if self.stem is None else self.stem, MAX_NAME - 8)
        file = _TemporaryFile(
            self.folder,
            stem=f"{stem}-{k}",
            overwrite=self.overwrite,
            before_rename=self.before_rename,
        )
        try:
            await asyncio.to_thread(file.create)
            return await self._with_retries(_Download(file, url, max_bytes=self.max_bytes))
        except DownloadError as exc:
            raise _final_error(exc, exc.problem, task_id=self.task_id) from exc.__cause__
        except (CannotSaveError, OSError) as exc:
            raise _cannot_save(exc, url, self.folder, self.task_id) from exc
        finally:
            if file.pending:
                # Neither another cancellation nor the end of the loop stops an executor's call.
                removal = asyncio.get_running_loop().run_in_executor(None, file.discard)
                await asyncio.shield(removal)

    async def _with_retries(self, download: _Download) -> Path:
        """Make attempts until one succeeds; the last failure is raised."""
        failures = 0
        while True:
            try:
                await download.receive(self.open_result)
                return await download.publish()
            except DownloadError as exc:
                failures += 1
                transient = isinstance(exc, TransientDownloadError)
                again = transient or (self.retry_expired and exc.expired)
                if failures >= self.attempts or not again:
                    raise
                if isinstance(exc, TransientDownloadError) and not exc.resumable:
                    download.start_over()
                logger.warning("download attempt %d: %s", failures, exc)
                await self.sleep(self.wait_after(failures))


def _all_saved(outcomes: Sequence[Path | BaseException], task_id: str) -> tuple[Path, ...]:
    saved = tuple(o for o in outcomes if isinstance(o, Path))
    failures = [o for o in outcomes if not isinstance(o, Path)]
    if not failures:
        return saved
    # Another error, such as a closed session, is about all files and goes first.
    first = next((f for f in failures if not isinstance(f, DownloadError)), failures[0])
    if len(outcomes) == 1 or not isinstance(first, DownloadError):
        raise first
    names = ", ".join(path.name for path in saved) or "none"
    error = _final_error(
        first,
        f"{len(failures)} of {len(outcomes)} results of task {printable(task_id)} could not be "
        f"saved (saved: {names}): {first.problem}",
        task_id=task_id,
    )
    error.saved = saved
    raise error from first


def _final_error(error: DownloadError, message: str, *, task_id: str) -> DownloadError:
    return DownloadError(
        message,
        url=error.url,
        path=error.path,
        status=error.status,
        expired=error.expired,
        task_id=task_id,
        advice=error.advice,
        way_past=error.way_past,
    )


def _cannot_save(
    exc: CannotSaveError | OSError, url: str, folder: Path, task_id: str
) -> DownloadError:
    bare = shown_url(url)
    if isinstance(exc, CannotSaveError):
        return DownloadError(
            f"{bare}: {exc}" if exc.path is None else str(exc),
            url=bare,
            path=exc.path,
            task_id=task_id,
            **exc.advice,
        )
    return DownloadError(
        f"cannot save to {printable(str(folder))}: {_reason(exc)}",
        url=bare,
        path=folder,
        task_id=task_id,
    )


def _reason(exc: OSError) -> str:
    messages = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "no permission to write there",
        errno.EPERM: "no permission to write there",
        errno.EROFS: "it is read-only",
        errno.ENOTDIR: "part of the path is a file, not a folder",
        errno.EISDIR: "there is a folder of the file's name",
    }
    return messages.get(exc.errno or 0, exc.strerror or type(exc).__name__)


# ---------------------------------------------------------------------------------------------
# Receiving


@define(eq=False)
class _Download:
    """The bytes received so far, over all attempts."""

    _file: _TemporaryFile
    _url: str
    _max_bytes: int = field(kw_only=True)
    _received: int = field(default=0, init=False)
    _total: int | None = field(default=None, init=False)
    _etag: str | None = field(default=None, init=False)
    _head: bytes = field(default=b"", init=False)
    _extension: str | None = field(default=None, init=False)
    _buffer: list[bytes] = field(factory=list, init=False)
    _buffered: int = field(default=0, init=False)
    _rewind: bool = field(default=False, init=False)

    def start_over(self) -> None:
        """Begin at the first byte with the next attempt."""
        self._received = self._buffered = 0
        self._total = self._etag = self._extension = None
        self._head = b""
        self._buffer.clear()
        self._rewind = True

    async def receive(self, open_result: OpenResult) -> None:
        """Make one attempt at the bytes that are still missing.

        Raises:
            TransientDownloadError: They did not arrive, or not all of them.
        """
        if self._etag is None:  # without one the rest may belong to another version
            self.start_over()
        async with open_result(self._url, self._received, self._etag) as stream:
            self._check_start(stream)
            async with contextlib.aclosing(stream.chunks) as chunks:
                async for chunk in chunks:
                    await self._add(chunk)
        self._check_end()

    def _check_start(self, stream: Stream) -> None:
        if stream.offset != self._received:
            self.start_over()
        if self._received:
            self._check_same(stream)
        else:
            self._total, self._etag = stream.total, stream.etag
        if self._total is not None and self._total > self._max_bytes:
            raise _too_large(self._max_bytes, self._total)

    def _check_same(self, stream: Stream) -> None:
        same_size = stream.total is None or stream.total == self._total
        if not same_size or stream.etag not in {None, self._etag}:
            raise self._transient("changed while it was downloaded", resumable=False)

    def _transient(self, why: str, *, resumable: bool) -> TransientDownloadError:
        shown = shown_url(self._url)
        return TransientDownloadError(f"{shown} {why}", url=shown, resumable=resumable)

    async def _add(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._buffer.append(chunk)
        self._buffered += len(chunk)
        if len(self._head) < _HEAD_BYTES:
            self._head += chunk[: _HEAD_BYTES - len(self._head)]
            if len(self._head) == _HEAD_BYTES:
                self._find_extension()
        if self._buffered >= _WRITE_BYTES:
            await self._flush()

    def _find_extension(self) -> None:
        self._extension = media_type(self._head)
        if self._extension is None:
            raise CannotSaveError(
                "what the host sent is no picture, video or sound that is known here; "
                f"it begins with {printable(repr(self._head[:40]))}"
            )

    async def _flush(self) -> None:
        data, rewind = b"".join(self._buffer), self._rewind
        self._buffer.clear()
        self._buffered, self._rewind = 0, False
        await asyncio.to_thread(self._file.write, data, rewind=rewind)

    def _check_end(self) -> None:
        missing = self._total is not None and self._received != self._total
        if missing or not self._received:
            expected = "more" if self._total is None else self._total
            raise self._transient(
                f"ended after {self._received} bytes, {expected} were announced",
                resumable=missing,
            )
        if self._extension is None:
            self._find_extension()

    async def publish(self) -> Path:
        """Give the file its final name.

        Raises:
            TransientDownloadError: It is incomplete.
        """
        await self._flush()
        path = await asyncio.to_thread(self._file.publish, self._extension or "", self._head)
        if path is None:
            raise self._transient(
                f"is incomplete: {self._received} bytes arrived, without the end of a "
                f"{self._extension} file",
                resumable=False,
            )
        return path


def _too_large(limit: int, size: int | None = None) -> CannotSaveError:
    has = "it has more" if size is None else f"it has {size}"
    return CannotSaveError(f"at most {limit} bytes are accepted (max_bytes), {has}")


# ---------------------------------------------------------------------------------------------
# Writing. Everything below blocks, and runs in a thread.


@define(eq=False)
class _TemporaryFile:
    """A file that does not have its final name yet.

    Its methods run in threads, which cannot be cancelled. Because of the lock `discard` waits
    for a write that is under way, and a `create` that runs late makes no file.
    """

    folder: Path
    _stem: str = field(kw_only=True)
    _overwrite: bool = field(kw_only=True)
    _before_rename: BeforeRename | None = field(default=None, kw_only=True)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)
    _file: IO[bytes] | None = field(default=None, init=False)
    _temporary: Path = field(default=Path(), init=False)
    _discarded: bool = field(default=False, init=False)
    pending: bool = field(default=True, init=False)

    def create(self) -> None:
        """Make the temporary file, and its folder if that is missing."""
        with self._lock:
            if self._discarded:
                return
            self._make_folder()
            if not self._overwrite:
                self._check_free()
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):  # not on every system
                flags |= getattr(os, name, 0)
            self._temporary = self.folder / f".{self._stem}.{secrets.token_hex(8)}.part"
            self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "r+b")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            why = "is a file, not a folder"
        except ValueError:  # a NUL character, half a surrogate pair
            why = "cannot be the name of a folder"
        else:
            return
        raise CannotSaveError(f"{printable(str(self.folder))} {why}", self.folder)

    def _check_free(self) -> None:
        for path in (self.folder / f"{self._stem}.{extension}" for extension in EXTENSIONS):
            if os.path.lexists(path):
                raise already_exists(path)

    def write(self, data: bytes, *, rewind: bool) -> None:
        """Append *data*; if *rewind*, drop all earlier bytes first."""
        with self._lock:
            if self._file is None:
                return
            if rewind and self._file.tell():
                self._file.seek(0)
                self._file.truncate()
            self._file.write(data)

    def publish(self, extension: str, head: bytes) -> Path | None:
        """Flush to disk and rename; returns None if the file is incomplete."""
        with self._lock:
            if self._file is None:
                return None
            self._file.flush()
            if not is_whole(self._file, extension, head):
                return None
            os.fsync(self._file.fileno())
            self._file.close()
            target = self.folder / f"{self._stem}.{extension}"
            if self._before_rename is not None:
                self._before_rename(self._temporary, target)
            rename(self._temporary, target, overwrite=self._overwrite)
            self._file = None
            self.pending = False
        sync_folder(self.folder)
        return target

    def discard(self) -> None:
        """Remove the temporary file."""
        with self._lock:
            self._discarded = True
            if self._file is None:
                return
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._file = None
