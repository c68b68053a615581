"""Saving one result, and what is in a folder afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile_results import png

from evolink_async import RetryPolicy
from evolink_async._results.fetch import ResultClient
from evolink_async._results.save import Saving
from evolink_async.errors import DownloadError

PICTURE = png(3000)
TASK = "task-unified-1757156493-imcg5zqt"


async def no_wait(_: float) -> None:
    """Replaces the wait between two attempts."""


def saving(client: ResultClient, folder: Path, **given: Any) -> Saving:
    how: dict[str, Any] = {
        "task_id": TASK,
        "attempts": 5,
        "wait_after": RetryPolicy(wait_jitter=0).wait_after,
        "sleep": no_wait,
    }
    return Saving(open_result=client.open, folder=folder, **how | given)


async def fetch(client: ResultClient, url: str, folder: Path, **given: Any) -> Path:
    return await saving(client, folder, stem="x", **given).save(url, 1)


async def failure(client: ResultClient, url: str, folder: Path, **given: Any) -> DownloadError:
    """The error of a download; nothing new may be left in *folder*."""
    before = contents(folder)
    with pytest.raises(DownloadError) as caught:
        await fetch(client, url, folder, **given)
    assert contents(folder) == before
    assert type(caught.value) is DownloadError
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below *folder*."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
