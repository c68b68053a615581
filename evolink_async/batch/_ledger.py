"""The memory of a batch: an SQLite file beside its pictures. Knows no HTTP.

Each change of an item's state is one ``await`` that returns once the change is on disk. The
states, where nothing goes wrong, from left to right::

    queued -> submitting -> submitted -> completed -> saved
                  |             |            |
              uncertain      failed       failed
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from attrs import define, field

from evolink_async.batch import _changes as changes
from evolink_async.batch import _loading as loading
from evolink_async.batch import _rows as rows
from evolink_async.batch._changes import EMULATOR, Fingerprint
from evolink_async.batch._connection import Connection, Work
from evolink_async.batch._rows import Counts, Entry, File, Invalid, Item, Loaded

__all__ = [
    "EMULATOR",
    "LEDGER",
    "Counts",
    "Entry",
    "File",
    "Invalid",
    "Item",
    "Ledger",
    "Loaded",
]

T = TypeVar("T")

LEDGER: Final = "ledger.sqlite3"


@define(eq=False)
class Ledger:
    """An open ledger; one at a time in the world. Use it as ``async with Ledger(folder)``."""

    path: Path
    _connection: Connection = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._connection = Connection(self.path)

    async def __aenter__(self) -> Self:
        """Open it, making it if need be.

        What a process that is gone left in state ``submitting`` becomes ``uncertain``.

        Raises:
            LedgerError: It is in use, of a newer format, damaged, or cannot be written.
        """
        await self._connection.open()
        try:
            await self._do(changes.disown)
        except BaseException:
            await self._connection.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def _do(self, work: Work[T]) -> T:
        return await self._connection.do(work)

    async def claim(
        self, api: str, fingerprint: Fingerprint | None, *, replace_key: bool = False
    ) -> None:
        """Record which API and key its tasks belong to, or see that it is the same as before.

        As long as nothing was accepted, or may have been, any API and key may take it over.

        Args:
            api: The base URL, or another lasting name of the API.
            fingerprint: A salted hash of the API key, which is kept; None for an API without
                accounts.
            replace_key: Take the key for a new one of the same account.

        Raises:
            LedgerError: It belongs to another API, or another key.
        """
        await self._do(
            partial(
                changes.claim,
                path=self.path,
                api=api,
                fingerprint=fingerprint,
                replace_key=replace_key,
            )
        )

    # -- the input -------------------------------------------------------------------------

    async def load(self, lines: Iterable[Entry | Invalid], *, skip_invalid: bool) -> Loaded:
        """Make *lines* the input of this batch, if all are good or bad ones may be skipped.

        *lines* is iterated in a thread of its own. Items are recognised by their user's id,
        or by their request and how many equal ones stand above them; lines that were edited
        take over equal items. Known items keep their state, the rest is queued. If no line is
        good, the input stays what it was.

        Raises:
            LedgerError: It cannot be written.
        """
        await self._do(loading.begin)
        async with aclosing(loading.chunks(lines)) as chunks:
            async for chunk in chunks:
                await self._do(partial(loading.take, chunk=chunk))
        return await self._do(partial(loading.finish, skip_invalid=skip_invalid))

    async def invalid(self, after: int = 0, limit: int = 500) -> tuple[Invalid, ...]:
        """The bad lines of the input last read, from behind line *after* on."""
        return await self._do(partial(loading.invalid, after=after, limit=limit))

    # -- questions -------------------------------------------------------------------------

    async def loss(self) -> str | None:
        """``removed`` or ``replaced`` if its file has its name no more; None if it has."""
        return await asyncio.to_thread(self._connection.loss)

    async def page(
        self, *states: str, after: tuple[int, int] = (0, 0), limit: int = 64
    ) -> tuple[Item, ...]:
        """Items in one of *states* (of any, if none is named), in the order of the input.

        Queued and failed items whose line is gone are left out.

        Args:
            *states: Which.
            after: ``(line, number)`` of the last item already seen.
            limit: At most so many.
        """
        return await self._do(partial(rows.page, states=states, after=after, limit=limit))

    async def counts(self) -> Counts:
        """The whole ledger in numbers."""
        return await self._do(rows.counts)

    # -- changes ---------------------------------------------------------------------------

    async def submitting(self, number: int, key: str) -> None:
        """Its POST may leave from now on, under this idempotency key.

        Raises:
            LedgerError: Its file is not the one others would open, another process may have
                the folder, or it cannot be written.
        """
        sql = (
            "UPDATE items SET state = 'submitting', idempotency_key = ?, submitting_at = ?, "
            "code = iif(task_id IS NULL, NULL, code), "
            "message = iif(task_id IS NULL, NULL, message), retryable = 0 WHERE number = ? "
            "AND state IN ('queued', 'uncertain', 'submitting')"
        )

        def submitting(connection: sqlite3.Connection) -> None:
            self._connection.check_files()
            changes.once(connection, sql, (key, time.time(), number))

        await self._do(submitting)

    async def queued(self, number: int) -> None:
        """Nothing of this submit was accepted: it may be submitted anew, under a new key."""
        await self._change(
            "UPDATE items SET state = 'queued', idempotency_key = NULL, submitting_at = NULL, "
            "queued_at = ? WHERE number = ? AND state IN ('queued', 'submitting')",
            (time.time(), number),
        )

    async def replacing(self, number: int) -> None:
        """It failed and is to be bought anew; until a submit may have left, it keeps its task."""
        await self._change(
            "UPDATE items SET state = 'queued', queued_at = ?, ended_at = NULL WHERE number = ?",
            (time.time(), number),
        )

    async def restore(self) -> None:
        """Items that were to be bought anew, and were not, have failed as before."""
        await self._do(changes.restore)

    async def uncertain(self, number: int, *, key: str | None, message: str) -> None:
        """Its submit may have been accepted; nobody knows its task."""
        await self._replace(
            "UPDATE items SET state = 'uncertain', idempotency_key = coalesce(?, idempotency_key), "
            "code = 'submit_uncertain', message = ?, ended_at = ? WHERE number = ?",
            (key, message, time.time(), number),
        )

    async def submitted(
        self, number: int, *, key: str | None, task_id: str, reserved: float | None
    ) -> None:
        """It was accepted as *task_id*."""
        await self._replace(
            "UPDATE items SET state = 'submitted', idempotency_key = coalesce(?, idempotency_key), "
            "code = NULL, message = NULL, task_id = ?, credits_reserved = ?, submitted_at = ? "
            "WHERE number = ?",
            (key, task_id, reserved, time.time(), number),
        )

    async def completed(
        self, number: int, *, snapshot: str, used: float | None, stems: Iterable[str]
    ) -> str:
        """Its results may be downloaded.

        Args:
            number: Which item.
            snapshot: Its task, as JSON.
            used: The credits it has cost, if known.
            stems: Beginnings of file names, the nicest first; looked at, in the ledger's
                thread, only if it has none yet.

        Returns:
            The beginning of its files' names: the one it has, else the first of *stems*
            that no other item has, in whatever case.
        """
        return await self._do(
            partial(changes.completed, number=number, snapshot=snapshot, used=used, stems=stems)
        )

    async def saved(self, number: int, files: Sequence[File]) -> None:
        """All its results are on disk."""
        await self._do(partial(changes.saved, number=number, files=files))

    async def damaged(self, number: int) -> None:
        """Its files are not what was saved: they must be downloaded again."""
        await self._change(
            "UPDATE items SET state = 'completed', saved_at = NULL WHERE number = ?", (number,)
        )

    async def unsaved(self, number: int, files: Mapping[int, File], message: str) -> None:
        """Not all its results are on disk, for that reason; these are, by position from 1."""
        await self._do(partial(changes.unsaved, number=number, files=files, message=message))

    async def files(self, number: int) -> dict[int, File]:
        """Its files as they were last saved, by position from 1."""
        return await self._do(partial(rows.files, number=number))

    async def failed(
        self,
        number: int,
        *,
        code: str,
        message: str,
        retryable: bool = False,
        used: float | None = None,
        guess: float | None = None,
    ) -> None:
        """Nothing will come of it by itself.

        Args:
            number: Which item.
            code: A word for the reason.
            message: The reason in words.
            retryable: Whether submitting it again may help.
            used: The credits it has cost, if known.
            guess: Given if its credits were not returned: what it has cost where the ledger
                knows no better.
        """
        await self._change(
            "UPDATE items SET state = 'failed', code = ?, message = ?, retryable = ?, "
            "credits_used = coalesce(?, credits_used, iif(?, credits_reserved, NULL), ?), "
            "ended_at = ? WHERE number = ?",
            (code, message, retryable, used, guess is not None, guess or None, time.time(), number),
        )

    async def requeue_failed(self) -> int:
        """Queue failed items of the input anew, those that are retryable."""
        return await self._do(changes.requeue_failed)

    async def reattach(self, code: str) -> None:
        """Look again at the tasks of items of the input that failed with *code*."""
        sql = (
            "UPDATE items SET state = 'submitted', credits_used = NULL, ended_at = NULL "
            "WHERE state = 'failed' AND wanted = 1 AND code = ? AND task_id IS NOT NULL"
        )
        await self._do(lambda connection: connection.execute(sql, (code,)))

    async def reopen(self, code: str) -> None:
        """Look again for the results of items of the input that failed with *code*."""
        sql = (
            "UPDATE items SET state = 'completed', ended_at = NULL WHERE state = 'failed' "
            "AND wanted = 1 AND code = ? AND snapshot IS NOT NULL"
        )
        await self._do(lambda connection: connection.execute(sql, (code,)))

    async def _replace(self, sql: str, values: tuple[Any, ...]) -> None:
        """A change by which the former task of an item bought anew is forgotten."""
        await self._do(partial(changes.replace, sql=sql, values=values))

    async def _change(self, sql: str, values: tuple[Any, ...]) -> None:
        await self._do(partial(changes.once, sql=sql, values=values))
