"""File names that are safe on every system, and renames that replace nothing by accident.

A picture is named in two steps: `safe_name` makes a name of the task's id (or of ``name=``),
and `_results.save.Saving` adds the number and the extension: ``<name>-<k>.<ext>``. In a
batch the name comes from `batch._files.stems`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Final

from evolink_async._text import printable

__all__ = [
    "MAX_NAME",
    "CannotSaveError",
    "already_exists",
    "rename",
    "safe_name",
    "sync_folder",
]

MAX_NAME: Final = 120
"""Characters of a file name without its extension."""


class CannotSaveError(Exception):
    """A file cannot be saved, and another attempt would not help.

    It becomes a `DownloadError`, which knows the link and the task.

    Attributes:
        path: The file or folder the message is about, None if it is about neither.
        advice: Values for ``advice`` and ``way_past`` of the `DownloadError`.
    """

    def __init__(self, message: str, path: Path | None = None, **advice: Any) -> None:
        super().__init__(message)
        self.path = path
        self.advice = advice


def already_exists(path: Path) -> CannotSaveError:
    return CannotSaveError(
        f"{printable(str(path))} exists",
        path,
        way_past="overwrite",
        advice="pass overwrite=True to replace it",
    )


def rename(source: Path, target: Path, *, overwrite: bool) -> None:
    """Rename *source* to *target*; an existing *target* is replaced only if *overwrite*."""
    if overwrite:
        source.replace(target)
        return
    try:
        # Unlike a check followed by a rename, this cannot replace a file made in between.
        target.hardlink_to(source)
    except FileExistsError:
        raise already_exists(target) from None
    except OSError:  # a file system without hard links
        _rename_into_reservation(source, target)
    else:
        source.unlink()


def _rename_into_reservation(source: Path, target: Path) -> None:
    try:
        target.touch(exist_ok=False)
    except FileExistsError:
        raise already_exists(target) from None
    try:
        source.replace(target)
    except OSError:
        target.unlink()
        raise


def sync_folder(folder: Path) -> None:
    # The file already has its name, so a folder that cannot be flushed is no error.
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def safe_name(text: str, limit: int = MAX_NAME) -> str:
    """*text* as a file name without extension that is valid on every system.

    A *text* that is such a name already is returned as it is. Otherwise the characters that
    are not allowed are replaced, and a hash keeps the names of different texts different.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".-").rstrip(".") or "file"
    device = r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)"  # reserved on Windows
    if re.match(device, name, re.IGNORECASE):
        name = f"_{name}"
    if name == text and len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: limit - 9]}-{digest}"
