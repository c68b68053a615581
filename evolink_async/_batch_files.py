"""The files of a batch's items: their names, their check sums, whose fault it is if not."""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import re
from pathlib import Path
from typing import Final

from evolink_async._download import _EXTENSIONS, _is_whole, media_type, safe_name
from evolink_async._ledger import File, Item
from evolink_async._models import GenerationResult
from evolink_async.errors import DownloadError, EvolinkError

__all__ = ["disk_error", "file_of", "matches", "stems", "sweep", "whole"]

logger = logging.getLogger(__name__)

_PARTIAL: Final = re.compile(r"\..+\.[0-9a-f]{16}\.part")


def stems(item: Item, folder: Path) -> tuple[str, ...]:
    """Names for its files, without extension, the nicest first; the last is its alone."""
    digest = hashlib.sha256(item.identity.encode()).hexdigest()
    if item.user_id is not None:
        name = safe_name(item.user_id, 80)
        unique = f"{name}-{digest[:16]}"
        # A file nobody told the ledger of is somebody else's.
        return (unique,) if _is_taken(folder, name) else (name, unique)
    prompt = str(item.request.get("prompt") or item.request.get("body", {}).get("prompt") or "")
    words = re.sub(r"[^a-z0-9]+", "-", prompt[:200].lower()).strip("-")[:40].strip("-")
    name = words or "picture"
    return (f"{name}-{digest[:8]}", f"{name}-{digest[:32]}")


def _is_taken(folder: Path, stem: str) -> bool:
    return any(folder.glob(f"{glob.escape(stem)}-1.*"))


def file_of(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(name=path.name, sha256=digest, bytes=file.tell())


def matches(folder: Path, files: tuple[File, ...]) -> bool:
    """True if all are as they were saved; one that was changed is kept under another name."""
    found = [_found(folder / each.name) for each in files]
    if list(files) == found:
        return True
    for before, now in zip(files, found, strict=True):
        if now is not None and now != before:
            kept = Path(now.name)
            kept = folder / f"{kept.stem}.changed-{now.sha256[:8]}{kept.suffix}"
            (folder / now.name).replace(kept)
            logger.warning("%s has changed since it was saved: kept as %s", now.name, kept.name)
    return False


def _found(path: Path) -> File | None:
    try:
        return file_of(path)
    except OSError:
        return None


def whole(
    folder: Path, stem: str, result: GenerationResult, recorded: tuple[File, ...]
) -> tuple[Path, ...]:
    """The files of a result that were not recorded as saved, if all are there and whole.

    Where they were once (*recorded*), they must still be what they were.
    """
    found = [_picture(folder, f"{stem}-{k}") for k in range(1, len(result.urls) + 1)]
    paths = tuple(path for path in found if path is not None)
    if len(paths) != len(found):
        return ()
    return paths if not recorded or [_found(path) for path in paths] == list(recorded) else ()


def _picture(folder: Path, stem: str) -> Path | None:
    """The file `Session.download` made under that name, if it is what its extension says."""
    paths = (folder / f"{stem}.{extension}" for extension in _EXTENSIONS)
    return next((path for path in paths if _is_picture(path)), None)


def _is_picture(path: Path) -> bool:
    extension = path.suffix[1:]
    try:
        with path.open("rb") as file:
            head = file.read(64)
            return media_type(head) == extension and _is_whole(file, extension, head)
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
