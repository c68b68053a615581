"""From ``completed`` to ``saved``: download, check, record, and look again for what is lost."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from attrs import define, field

from evolink_async._model.snapshots import GenerationResult
from evolink_async._session import read_once, save_result
from evolink_async._text import printable
from evolink_async.batch._context import RunContext
from evolink_async.batch._files import (
    damage,
    disk_error,
    file_of,
    keep_stranger,
    present,
    whole,
)
from evolink_async.batch._items import LiveItem
from evolink_async.batch._ledger import EXPIRED, Item
from evolink_async.errors import DownloadError, EvolinkError, NotFoundError, SessionClosedError

__all__ = ["Saver"]

logger = logging.getLogger(__name__)

_LINKS_LIVE: Final = 24 * 3600.0
"""Seconds after its task completed that a result link works, by the API's page."""


@define(eq=False)
class Saver:
    """Saves the files of completed items.

    Attributes:
        pictures: How many files it has saved.
        kept: Files that had the name of a picture and were not that picture, under the names
            they have now.
    """

    run: RunContext
    pictures: int = field(default=0, init=False)
    kept: list[Path] = field(factory=list, init=False)

    async def save(self, live: LiveItem, result: GenerationResult, stem: str) -> None:
        """Save the files of *result*, or record why they cannot be."""
        if self.run.stop is not None and self.run.stop.kind == "disk":
            return
        try:
            await self._save(live, result, stem, again=live.item.state == "completed")
        except SessionClosedError as exc:
            self.run.halt_for(exc)

    async def _save(
        self, live: LiveItem, result: GenerationResult, stem: str, *, again: bool
    ) -> None:
        """*again*: an earlier run may have begun to, and the links may have changed since."""
        item, old = live.item, _is_old(live.item, result)
        try:
            paths = await self._download(item, result, stem, retry_expired=not old)
        except DownloadError as exc:
            if (why := disk_error(exc)) is not None:
                self.run.halt("disk", f"{exc}; {why}, then run the same batch again")
                return
            why = f"{exc.url}: the host answered {exc.status}" if exc.expired else str(exc)
            await self._keep_part(item, exc.saved, why)
            now, unknown = await self._read_again(item, result) if again else (result, False)
            if now is not None and now.urls != result.urls:
                await self._save(live, now, stem, again=False)
            elif now is not None and (old or (unknown and exc.expired)):
                await self._expire(live, result, stem, why)
            else:
                logger.warning("%s is not saved yet: %s", item.place, why)
        else:
            await self._saved(live, paths)

    async def _download(
        self, item: Item, result: GenerationResult, stem: str, *, retry_expired: bool
    ) -> tuple[Path, ...]:
        """Its files: those that are there as they were saved, and the others anew."""
        folder = self.run.folder
        there: dict[int, Path] = {}
        if item.state == "completed":  # only then can there be any
            recorded = await self.run.ledger.files(item.number)
            files = await self.run.in_thread(present, folder, recorded.values())
            there = {k: folder / file.name for k, file in recorded.items() if file in files}
        return await save_result(
            self.run.session,
            result,
            folder,
            stem=stem,
            existing=there,
            overwrite=True,
            before_rename=self._keep_stranger,
            retry_expired=retry_expired,
        )

    def _keep_stranger(self, new: Path, target: Path) -> None:
        """Keep what has the name of a picture, and is not that picture, under another name."""
        kept = keep_stranger(new, target)
        if kept is not None:
            self.kept.append(kept)
            logger.warning("%s is not what was saved there: kept as %s", target.name, kept.name)

    async def _saved(self, live: LiveItem, paths: tuple[Path, ...]) -> None:
        files = await self.run.in_thread(lambda: [file_of(path) for path in paths])
        await self.run.ledger.saved(live.item.number, files)
        self.pictures += len(files)
        live.moved("saved")

    async def _keep_part(self, item: Item, paths: tuple[Path, ...], why: str) -> None:
        """Record what there is of its files, and why there is no more."""
        files = await self.run.in_thread(
            lambda: {int(path.stem.rpartition("-")[2]): file_of(path) for path in paths}
        )
        await self.run.ledger.unsaved(item.number, files, printable(why, 500))

    async def _read_again(
        self, item: Item, result: GenerationResult
    ) -> tuple[GenerationResult | None, bool]:
        """The result as the API gives it now, and whether the API does not know the task.

        It may have other links now; it is None if the API cannot be asked.
        """
        try:
            now = await read_once(self.run.session, result.task_id)
        except EvolinkError as exc:
            if isinstance(exc, NotFoundError):
                return result, exc.from_api
            logger.warning("%s: its task cannot be read: %s", item.place, exc)
            return None, False
        return (GenerationResult.from_snapshot(now) if now.urls else result), False

    async def _expire(self, live: LiveItem, result: GenerationResult, stem: str, why: str) -> None:
        """Its links have expired, or nobody knows them: what is not on disk is lost."""
        folder = self.run.folder
        recorded = await self.run.ledger.files(live.item.number)
        paths = await self.run.in_thread(whole, folder, stem, result, recorded)
        damaged = await self.run.in_thread(damage, folder, recorded.values())
        if paths:  # only the record was missing
            await self._saved(live, paths)
            return
        await live.give_up(
            EXPIRED,
            f"{damaged and damaged + ', and '}the links to its results have expired (they live "
            f"24 hours; {printable(why, 200)}); submitting it again pays again",
        )


def _is_old(item: Item, result: GenerationResult) -> bool:
    """Whether its links have expired by this machine's clock; if that cannot be said, no."""
    ended = item.times.get("completed", float("inf"))
    if "submitted" in item.times and result.duration is not None:
        ended = min(ended, item.times["submitted"] + max(0.0, result.duration))
    return time.time() - ended >= _LINKS_LIVE
