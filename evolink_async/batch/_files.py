"""The files of a batch: names, check sums, and what to say when they are missing."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from evolink_async._checks import refuse
from evolink_async._files import safe_name
from evolink_async._model.snapshots import GenerationResult
from evolink_async._results.media import EXTENSIONS, is_whole, media_type
from evolink_async._text import printable
from evolink_async.batch._rows import File, Item
from evolink_async.errors import ConfigurationError, DownloadError, EvolinkError

__all__ = [
    "damage",
    "disk_error",
    "file_of",
    "keep_stranger",
    "make_folder",
    "present",
    "stems",
    "sweep",
    "whole",
]

_PARTIAL: Final = re.compile(r"\..+\.[0-9a-f]{16}\.part")


def make_folder(out: str | os.PathLike[str]) -> Path:
    """The folder *out*, made if need be, and seen to be one that can be written to.

    Raises:
        ConfigurationError: It cannot.
    """
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise refuse("out", out, "the path of a folder")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(8)}.probe"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it cannot be the name of a folder"
        raise ConfigurationError(
            f"the folder {printable(str(folder))} cannot be written to: {why}; choose another one"
        ) from exc
    return folder.resolve()


def stems(item: Item, folder: Path, count: int) -> Iterator[str]:
    """Names for the *count* files of an item, without extension, the nicest first.

    A name is left out if a file that has it is there already: it is somebody else's.
    """
    names = _names(item)
    yield from (name for name in names if not _is_taken(folder, name, count))
    yield f"{names[-1]}-{secrets.token_hex(8)}"


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
    start = os.fspath(folder / stem)
    return any(
        os.path.lexists(f"{start}-{k}.{extension}")
        for k in range(1, count + 1)
        for extension in EXTENSIONS
    )


def file_of(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(name=path.name, sha256=digest, bytes=file.tell())


def present(folder: Path, files: Iterable[File]) -> tuple[File, ...]:
    """Those of *files* that are as they were saved."""
    return tuple(each for each in files if _found(folder / each.name) == each)


def damage(folder: Path, files: Iterable[File]) -> str:
    """In words, which of *files* are not as they were saved; nothing if all are."""
    files = tuple(files)
    good = present(folder, files)
    return ", ".join(
        f"{file.name} {'has changed' if os.path.lexists(folder / file.name) else 'is missing'}"
        for file in files
        if file not in good
    )


def _found(path: Path) -> File | None:
    """The file *path*; None of what is no file, or cannot be read."""
    try:
        return file_of(path) if path.is_file() else None  # a pipe would be waited for
    except OSError:
        return None


def keep_stranger(new: Path, target: Path) -> Path | None:
    """Rename what has the name *target* if it is other than the picture *new*.

    Returns:
        What it is called now; None if there was nothing to keep.
    """
    old = _found(target)
    if old is not None and old.sha256 == file_of(new).sha256:
        return None
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink()):
        return None  # the rename of *new* fails on a folder, and says so
    digest = secrets.token_hex(32) if old is None else old.sha256
    start, end = target.with_suffix(""), target.suffix
    names = (Path(f"{start}.changed-{digest[:k]}{end}") for k in (8, 16, 64))
    free = (path for path in names if not os.path.lexists(path))
    kept = next(free, Path(f"{start}.changed-{secrets.token_hex(16)}{end}"))
    target.rename(kept)
    return kept


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
    """The picture under that name, if it is what was recorded, or else whole."""
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
    """Remove what a killed process has left of files it was writing."""
    for path in folder.glob(".*.part"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)
