"""The files of a batch: their names, their check sums, whose fault it is if they are not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Final

from attrs import define, field

from evolink_async._files import safe_name, sync_folder
from evolink_async._model.snapshots import GenerationResult
from evolink_async._results.media import EXTENSIONS, is_whole, media_type
from evolink_async.batch._ledger import File, Item
from evolink_async.errors import DownloadError, EvolinkError

__all__ = [
    "Draft",
    "digest_of",
    "disk_error",
    "file_of",
    "is_foreign",
    "kept_from",
    "present",
    "set_aside",
    "stems",
    "sweep",
    "trouble_with",
    "whole",
]

_PARTIAL: Final = re.compile(r"\..+\.[0-9a-f]{16}\.part")


def stems(item: Item, folder: Path, count: int) -> tuple[str, ...]:
    """Names for its *count* files, without extension, the nicest first; the last is its alone.

    A file that nobody told the ledger of is somebody else's: its name is not among them.
    """
    free = [stem for stem in _names(item) if not _is_taken(folder, stem, count)]
    return tuple(free) or (f"{_names(item)[-1]}-{secrets.token_hex(8)}",)


def _names(item: Item) -> tuple[str, str]:
    digest = hashlib.sha256(item.identity.encode()).hexdigest()
    if item.user_id is not None:
        name = safe_name(item.user_id, 64)
        return name, f"{name}-{digest[:16]}"
    prompt = str(item.request.get("prompt") or item.request.get("body", {}).get("prompt") or "")
    words = re.sub(r"[^a-z0-9]+", "-", prompt[:200].lower()).strip("-")[:40].strip("-")
    name = words or "picture"
    return f"{name}-{digest[:8]}", f"{name}-{digest[:32]}"


def _is_taken(folder: Path, stem: str, count: int) -> bool:
    # One by one, as the file system compares names: a folder of thousands is not read each time.
    names = (f"{stem}-{k}.{ext}" for k in range(1, count + 1) for ext in EXTENSIONS)
    return any(os.path.lexists(folder / name) for name in names)


@define(eq=False)
class Draft:
    """A text file that gets its name when it is whole and on disk; everything blocks."""

    path: Path
    _temporary: Path = field(init=False)
    _file: IO[bytes] = field(init=False)
    _hash: hashlib._Hash = field(factory=hashlib.sha256, init=False)

    def open(self) -> None:
        """Make it, under a name that `sweep` knows; and its folder, should that be gone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.part")
        self._file = self._temporary.open("xb")

    def write(self, text: str) -> None:
        data = text.encode()
        self._hash.update(data)
        self._file.write(data)

    def finish(self) -> str:
        """See that it is on disk; returns its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def publish(self, ours: Collection[str]) -> None:
        """Give it its name, if what has that name now is one of *ours*, by SHA-256.

        Raises:
            FileExistsError: It is somebody else's.
        """
        if is_foreign(self.path, ours):
            raise FileExistsError(errno.EEXIST, "what is there is not what the batch wrote")
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove it, unless it has its name."""
        with contextlib.suppress(OSError):  # what is still in memory may find no room
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file; None of what is no file, or cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def is_foreign(path: Path, ours: Collection[str]) -> bool:
    """True if there is something of that name that is not one of *ours*, by SHA-256."""
    return os.path.lexists(path) and digest_of(path) not in ours


def file_of(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(name=path.name, sha256=digest, bytes=file.tell())


def present(folder: Path, files: Iterable[File]) -> tuple[File, ...]:
    """Those of *files* that are as they were saved."""
    return tuple(each for each in files if _found(folder / each.name) == each)


def trouble_with(folder: Path, files: Iterable[File]) -> str:
    """In words, which of *files* are not as they were saved; nothing if all are."""
    gone = [file for file in files if file not in present(folder, (file,))]
    return ", ".join(
        f"{file.name} {'has changed' if os.path.lexists(folder / file.name) else 'is missing'}"
        for file in gone
    )


def _found(path: Path) -> File | None:
    try:
        return file_of(path)
    except OSError:
        return None


def set_aside(path: Path) -> Path | None:
    """Give what has that name another one, and return that; None if there is nothing.

    A folder stays: it is in the way, but nothing would be written over it.
    """
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
        return None
    digest = digest_of(path) or secrets.token_hex(32)
    names = (f"{path.stem}.changed-{digest[:k]}{path.suffix}" for k in (8, 16, 64))
    free = (path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    kept = next(free, path.with_name(f"{path.stem}.changed-{secrets.token_hex(16)}{path.suffix}"))
    path.rename(kept)
    return kept


def kept_from(new: Path, target: Path) -> Path | None:
    """`set_aside` for *target*, should it be other than *new*, which gets that name next."""
    return set_aside(target) if digest_of(target) != digest_of(new) else None


def whole(
    folder: Path, stem: str, result: GenerationResult, recorded: Mapping[int, File]
) -> tuple[Path, ...]:
    """The files of a result that were not recorded as saved, if all are there and whole.

    Where they were once (*recorded*, by position), they must still be what they were.
    """
    found = (
        _picture(folder, f"{stem}-{k}", recorded.get(k)) for k in range(1, len(result.urls) + 1)
    )
    paths = tuple(path for path in found if path is not None)
    return paths if len(paths) == len(result.urls) else ()


def _picture(folder: Path, stem: str, recorded: File | None) -> Path | None:
    """The file `Session.download` made under that name, if it is what its extension says."""
    if recorded is not None:
        return folder / recorded.name if present(folder, (recorded,)) else None
    paths = (folder / f"{stem}.{extension}" for extension in EXTENSIONS)
    return next((path for path in paths if _is_picture(path)), None)


def _is_picture(path: Path) -> bool:
    extension = path.suffix[1:]
    try:
        with path.open("rb") as file:
            head = file.read(64)
            return media_type(head) == extension and is_whole(file, extension, head)
    except OSError:
        return False


def disk_error(exc: BaseException) -> str | None:
    """What to do about the disk, if that is why a file could not be saved."""
    if not isinstance(exc, DownloadError) or exc.path is None:
        return None
    cause: BaseException | None = exc
    while cause is not None and (not isinstance(cause, OSError) or isinstance(cause, EvolinkError)):
        cause = cause.__cause__
    if cause is None or getattr(cause, "errno", None) == errno.EISDIR:
        return None
    full = getattr(cause, "errno", None) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return "make room" if full else "make it writable"


def sweep(folder: Path) -> None:
    """Remove what downloads of a process that was killed have left; nobody else has the folder."""
    for path in folder.glob(".*.part"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)
