"""Names and renames on disk that hold on every file system."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Final

from evolink_async._text import printable

__all__ = ["NAME_LIMIT", "Refused", "exists", "rename", "safe_name", "sync_folder"]

NAME_LIMIT: Final = 120


class Refused(Exception):  # noqa: N818 - a verdict on its way to becoming a DownloadError
    """What arrived, or where it should go, cannot be used, and another try would not help.

    Attributes:
        path: The file it is about, if any.
        advice: How to get past it: the data of an `EvolinkError`.
    """

    def __init__(self, message: str, path: Path | None = None, **advice: Any) -> None:
        super().__init__(message)
        self.path = path
        self.advice = advice


def exists(path: Path) -> Refused:
    return Refused(
        f"{printable(str(path))} exists",
        path,
        way_past="overwrite",
        advice="pass overwrite=True to replace it",
    )


def rename(source: Path, target: Path, *, overwrite: bool) -> None:
    """Give *source* the name *target*; unless *overwrite*, only if nobody has it."""
    if overwrite:
        source.replace(target)
        return
    try:
        # Unlike a check followed by a rename, this cannot replace a file made in between.
        target.hardlink_to(source)
    except FileExistsError:
        raise exists(target) from None
    except OSError:  # a file system without links
        _rename_into_reservation(source, target)
    else:
        source.unlink()


def _rename_into_reservation(source: Path, target: Path) -> None:
    try:
        target.touch(exist_ok=False)
    except FileExistsError:
        raise exists(target) from None
    try:
        source.replace(target)
    except OSError:
        target.unlink()
        raise


def sync_folder(folder: Path) -> None:
    # The file is there under its name already: where a folder cannot be flushed, so be it.
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_DEVICE: Final = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)", re.IGNORECASE)


def safe_name(text: str, limit: int = NAME_LIMIT) -> str:
    """*text* as a file name, without extension, on any system; *text* itself if it is one.

    Otherwise what is not allowed is replaced, and a hash keeps different texts apart.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".-").rstrip(".") or "file"
    if _DEVICE.match(name):
        name = f"_{name}"
    if name == text and len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: limit - 9]}-{digest}"
