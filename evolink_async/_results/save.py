"""A result stream to a file: under a temporary name until it is whole, checked and on disk.

Nothing about the name or the type is taken from outside: the name comes from the task's id,
the extension from the first bytes. Knows no HTTP; what it reads from is a `Stream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final

from attrs import define, field

from evolink_async._files import (
    NAME_LIMIT,
    Refused,
    exists,
    rename,
    safe_name,
    sync_folder,
)
from evolink_async._hosts import shown_url
from evolink_async._results.media import EXTENSIONS, is_whole, media_type
from evolink_async._results.stream import Interrupted, OpenResult, Stream
from evolink_async._text import printable
from evolink_async.errors import DownloadError

__all__ = ["MAX_BYTES", "MAX_FILES", "MakeWay", "save", "save_all"]

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 64 * 1024 * 1024
"""Largest file that is saved unless told otherwise: ten 1440x1440 pictures, uncompressed."""
MAX_FILES: Final = 100
"""Most links of one task that are followed; the API's page allows 4 pictures."""

_ATTEMPTS: Final = 5
_HEAD: Final = 64
_FLUSH_AT: Final = 512 * 1024


MakeWay = Callable[[Path, Path], None]
"""Told of a whole file, and of the name it gets next."""


def _backoff(failures: int) -> float:
    return float(min(8.0, 0.5 * 2.0 ** (failures - 1)))


# ---------------------------------------------------------------------------------------------
# Saving


async def save_all(
    open_result: OpenResult,
    urls: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    task_id: str,
    stem: str | None = None,
    there: Mapping[int, Path] = MappingProxyType({}),
    overwrite: bool = False,
    make_way: MakeWay | None = None,
    patient: bool = False,
    max_bytes: int = MAX_BYTES,
    attempts: int = _ATTEMPTS,
    wait_after: Callable[[int], float] = _backoff,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> tuple[Path, ...]:
    """Save every link of a task as ``<folder>/<stem>-<k>.<ext>``, k from 1; returns the paths.

    All are tried, at the same time, but those that are *there*, by k. *stem* is the task's id
    unless told; the other parameters are those of `save`.

    Raises:
        DownloadError: The first of the failures, saying which files were saved; they stay.
    """
    if len(urls) > MAX_FILES:
        raise DownloadError(
            f"task {printable(task_id)} has {len(urls)} links; at most {MAX_FILES} are followed",
            url="",
            task_id=task_id,
        )
    stem = safe_name(task_id if stem is None else stem, NAME_LIMIT - 8)
    wanted = {k: url for k, url in enumerate(urls, 1) if k not in there}
    outcomes = await asyncio.gather(
        *(
            save(
                open_result,
                url,
                folder,
                f"{stem}-{k}",
                overwrite=overwrite,
                make_way=make_way,
                patient=patient,
                max_bytes=max_bytes,
                task_id=task_id,
                attempts=attempts,
                wait_after=wait_after,
                sleep=sleep,
            )
            for k, url in wanted.items()
        ),
        return_exceptions=True,
    )
    all_ = {**there, **dict(zip(wanted, outcomes, strict=True))}
    return _all_saved([all_[k] for k in range(1, len(urls) + 1)], task_id)


def _all_saved(outcomes: Sequence[Path | BaseException], task_id: str) -> tuple[Path, ...]:
    saved = tuple(o for o in outcomes if isinstance(o, Path))
    failures = [o for o in outcomes if not isinstance(o, Path)]
    if not failures:
        return saved
    # A closed session, a cancelled save, a mistake of ours: not about this file.
    first = next((f for f in failures if not isinstance(f, DownloadError)), failures[0])
    if len(outcomes) == 1 or not isinstance(first, DownloadError):
        raise first
    names = ", ".join(path.name for path in saved) or "none"
    error = _plain(
        first,
        f"{len(failures)} of {len(outcomes)} results of task {printable(task_id)} could not be "
        f"saved (saved: {names}): {first.problem}",
        task_id=task_id,
    )
    error.saved = saved
    raise error from first


async def save(
    open_result: OpenResult,
    url: str,
    folder: str | os.PathLike[str],
    stem: str,
    *,
    overwrite: bool = False,
    make_way: MakeWay | None = None,
    patient: bool = False,
    max_bytes: int = MAX_BYTES,
    task_id: str | None = None,
    attempts: int = _ATTEMPTS,
    wait_after: Callable[[int], float] = _backoff,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Path:
    """Save the result behind *url* as ``<folder>/<stem>.<ext>``; returns that path.

    The extension is that of what really arrived. Under that name there is, at any moment,
    either nothing, what was there before, or the whole file.

    Args:
        open_result: Opens the link.
        url: The link.
        folder: Where to save; made if missing.
        stem: Name without extension; made safe by `safe_name`.
        overwrite: Whether an existing file may be replaced.
        make_way: Called, in a thread, before the whole file gets its name.
        patient: Whether a link that seems to have expired is tried again, as one that is
            known to be fresh should be.
        max_bytes: Largest file, in bytes, that is accepted.
        task_id: For the errors.
        attempts: How often to try in all. A broken download goes on where it broke off if
            the host can do that and the result is still the same, else it starts over.
        wait_after: Seconds to wait after that many failures.
        sleep: Waits that long.

    Raises:
        DownloadError: It could not be saved; nothing is left behind.
    """
    partial = _Partial(Path(folder), stem=safe_name(stem), overwrite=overwrite, make_way=make_way)
    transfer = _Transfer(partial, max_bytes=max_bytes)
    try:
        await asyncio.to_thread(partial.create)
        return await _persist(
            open_result,
            url,
            transfer,
            patient=patient,
            attempts=attempts,
            wait_after=wait_after,
            sleep=sleep,
        )
    except DownloadError as exc:
        raise _plain(exc, exc.problem, task_id=task_id) from exc.__cause__
    except (Refused, OSError) as exc:
        raise _not_saved(exc, url, partial.folder, task_id) from exc
    finally:
        if partial.pending:
            # In an executor's future, not in an asyncio task: cancelling us again, or closing
            # the loop, must not keep the file from being removed.
            removal = asyncio.get_running_loop().run_in_executor(None, partial.discard)
            await asyncio.shield(removal)


async def _persist(
    open_result: OpenResult,
    url: str,
    transfer: _Transfer,
    *,
    patient: bool,
    attempts: int,
    wait_after: Callable[[int], float],
    sleep: Callable[[float], Awaitable[object]],
) -> Path:
    """Attempts until one succeeds."""
    failures = 0
    while True:
        try:
            await transfer.receive(open_result, url)
            return await transfer.publish(url)
        except DownloadError as exc:
            failures += 1
            may_pass = isinstance(exc, Interrupted) or (patient and exc.expired)
            if not may_pass or failures >= attempts:
                raise
            if isinstance(exc, Interrupted) and exc.restart:
                transfer.forget()
            logger.warning("download attempt %d: %s", failures, exc)
            await sleep(wait_after(failures))


def _plain(error: DownloadError, message: str, *, task_id: str | None) -> DownloadError:
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


def _not_saved(
    exc: Refused | OSError, url: str, folder: Path, task_id: str | None
) -> DownloadError:
    bare = shown_url(url)
    if isinstance(exc, Refused):
        return DownloadError(
            f"{bare}: {exc}" if exc.path is None else str(exc),
            url=bare,
            path=exc.path,
            task_id=task_id,
            **exc.advice,
        )
    return DownloadError(
        f"cannot save to {printable(str(folder))}: {_why(exc)}",
        url=bare,
        path=folder,
        task_id=task_id,
    )


def _why(exc: OSError) -> str:
    words = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "no permission to write there",
        errno.EPERM: "no permission to write there",
        errno.EROFS: "it is read-only",
        errno.ENOTDIR: "part of the path is a file, not a folder",
        errno.EISDIR: "there is a folder of the file's name",
    }
    return words.get(exc.errno or 0, exc.strerror or type(exc).__name__)


# ---------------------------------------------------------------------------------------------
# Receiving


@define(eq=False)
class _Transfer:
    """What has been received so far, over however many attempts."""

    _partial: _Partial
    _max_bytes: int = field(kw_only=True)
    _received: int = field(default=0, init=False)
    _total: int | None = field(default=None, init=False)
    _etag: str | None = field(default=None, init=False)
    _head: bytes = field(default=b"", init=False)
    _type: str | None = field(default=None, init=False)
    _buffer: list[bytes] = field(factory=list, init=False)
    _buffered: int = field(default=0, init=False)
    _rewind: bool = field(default=False, init=False)

    def forget(self) -> None:
        """Start over with the next attempt."""
        self._received = self._buffered = 0
        self._total = self._etag = self._type = None
        self._head = b""
        self._buffer.clear()
        self._rewind = True

    async def receive(self, open_result: OpenResult, url: str) -> None:
        """One attempt: everything, or what is still missing.

        Raises:
            Interrupted: It broke off.
        """
        if self._etag is None:  # nothing says that the rest would belong to this beginning
            self.forget()
        async with open_result(url, offset=self._received, etag=self._etag) as stream:
            self._begin(stream, url)
            async with contextlib.aclosing(stream.chunks()) as chunks:
                async for chunk in chunks:
                    await self._take(chunk)
        self._end(url)

    def _begin(self, stream: Stream, url: str) -> None:
        if stream.offset != self._received:
            self.forget()
        if self._received:
            self._check_same(stream, url)
        else:
            self._total = stream.total
            self._etag = stream.etag if stream.accepts_ranges else None
        if self._total is not None and self._total > self._max_bytes:
            raise _too_large(self._max_bytes, self._total)

    def _check_same(self, stream: Stream, url: str) -> None:
        same_size = stream.total is None or stream.total == self._total
        if not same_size or stream.etag not in {None, self._etag}:
            raise Interrupted(
                f"{shown_url(url)} changed while it was downloaded",
                url=shown_url(url),
                restart=True,
            )

    async def _take(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._buffer.append(chunk)
        self._buffered += len(chunk)
        if len(self._head) < _HEAD:
            self._head += chunk[: _HEAD - len(self._head)]
            if len(self._head) == _HEAD:
                self._recognise()
        if self._buffered >= _FLUSH_AT:
            await self._flush()

    def _recognise(self) -> None:
        self._type = media_type(self._head)
        if self._type is None:
            raise Refused(
                "what the host sent is no picture, video or sound that is known here; "
                f"it begins with {printable(repr(self._head[:40]))}"
            )

    async def _flush(self) -> None:
        data, rewind = b"".join(self._buffer), self._rewind
        self._buffer.clear()
        self._buffered, self._rewind = 0, False
        await asyncio.to_thread(self._partial.write, data, rewind=rewind)

    def _end(self, url: str) -> None:
        missing = self._total is not None and self._received != self._total
        if missing or not self._received:
            expected = "more" if self._total is None else self._total
            raise Interrupted(
                f"{shown_url(url)} ended after {self._received} bytes, {expected} were announced",
                url=shown_url(url),
                restart=not missing,
            )
        if self._type is None:
            self._recognise()

    async def publish(self, url: str) -> Path:
        """Give the file its final name.

        Raises:
            Interrupted: It is not whole.
        """
        await self._flush()
        path = await asyncio.to_thread(self._partial.publish, self._type or "", self._head)
        if path is None:
            raise Interrupted(
                f"{shown_url(url)} is incomplete: {self._received} bytes arrived, without the end "
                f"of a {self._type} file",
                url=shown_url(url),
                restart=True,
            )
        return path


def _too_large(limit: int, size: int | None = None) -> Refused:
    has = "it has more" if size is None else f"it has {size}"
    return Refused(f"at most {limit} bytes are accepted (max_bytes), {has}")


# ---------------------------------------------------------------------------------------------
# Writing. Everything below blocks, and runs in a thread.


@define(eq=False)
class _Partial:
    """A file that does not have its final name yet.

    A thread cannot be cancelled: the lock makes `discard` wait for a write still under
    way, and keeps a late `create` from leaving a file behind.
    """

    folder: Path
    _stem: str = field(kw_only=True)
    _overwrite: bool = field(kw_only=True)
    _make_way: MakeWay | None = field(default=None, kw_only=True)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)
    _file: IO[bytes] | None = field(default=None, init=False)
    _temporary: Path = field(default=Path(), init=False)
    _discarded: bool = field(default=False, init=False)
    pending: bool = field(default=True, init=False)

    def create(self) -> None:
        """Make the folder if it is missing, and in it the temporary file."""
        with self._lock:
            if self._discarded:
                return
            self._make_folder()
            if not self._overwrite:
                self._check_free()
            self._temporary = self.folder / f".{self._stem}.{secrets.token_hex(8)}.part"
            self._file = os.fdopen(os.open(self._temporary, _OPEN_FLAGS, 0o666), "r+b")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            why = "is a file, not a folder"
        except ValueError:  # a NUL character, half a surrogate pair
            why = "cannot be the name of a folder"
        else:
            return
        raise Refused(f"{printable(str(self.folder))} {why}", self.folder)

    def _check_free(self) -> None:
        for path in (self.folder / f"{self._stem}.{extension}" for extension in EXTENSIONS):
            if os.path.lexists(path):
                raise exists(path)

    def write(self, data: bytes, *, rewind: bool) -> None:
        """Append *data*; instead of what there is if *rewind*."""
        with self._lock:
            if self._file is None:
                return
            if rewind and self._file.tell():
                self._file.seek(0)
                self._file.truncate()
            self._file.write(data)

    def publish(self, extension: str, head: bytes) -> Path | None:
        """Flush to disk and rename; None if the file is not whole."""
        with self._lock:
            if self._file is None:
                return None
            self._file.flush()
            if not is_whole(self._file, extension, head):
                return None
            os.fsync(self._file.fileno())
            self._file.close()
            target = self.folder / f"{self._stem}.{extension}"
            if self._make_way is not None:
                self._make_way(self._temporary, target)
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


_OPEN_FLAGS: Final = (
    os.O_CREAT
    | os.O_EXCL
    | os.O_RDWR
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


# ---------------------------------------------------------------------------------------------
# Names and types
