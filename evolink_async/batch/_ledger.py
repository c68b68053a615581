"""The memory of a batch: an SQLite file beside its pictures. Knows no HTTP.

Each change of an item's state is one ``await`` that returns once the change is on disk. The
states, where nothing goes wrong, from left to right::

    queued -> submitting -> submitted -> completed -> saved
                  |             |            |
              uncertain      failed       failed
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final, Self

from attrs import define, fields

from evolink_async.batch import _loading as loading
from evolink_async.batch._connection import Connection, committed
from evolink_async.batch._rows import Counts, Entry, File, Invalid, Item, Loaded
from evolink_async.errors import LedgerError

__all__ = [
    "EMULATOR",
    "EXPIRED",
    "LEDGER",
    "NOT_FOUND",
    "Counts",
    "Entry",
    "File",
    "Invalid",
    "Item",
    "Ledger",
    "Loaded",
]

LEDGER: Final = "ledger.sqlite3"
EMULATOR: Final = "emulator"
"""The name of every embedded emulator: each has another port."""
NOT_FOUND: Final = "task_not_found"
"""Code of items whose task the API did not know; kept while it is asked once more."""
EXPIRED: Final = "results_expired"
"""Code of items whose results were not fetched in time; kept while they are looked for again."""

_COLUMNS: Final = tuple(each.name for each in fields(Item) if each.name not in {"times", "files"})
_TIMES: Final = ("queued", "submitting", "submitted", "completed", "saved", "ended")
_PAID: Final = "('submitted', 'completed', 'saved')"
_RELEVANT: Final = "(wanted = 1 OR state NOT IN ('queued', 'failed'))"
"""An item whose line is gone counts only if it has cost, or may have cost, something."""
_FAILED: Final = "state = 'failed' AND wanted = 1"
_GONE: Final = f"{_FAILED} AND code IN ('{EXPIRED}', '{NOT_FOUND}')"
"""True for a failed item whose results can no longer be had."""
_REPLACED: Final = "state = 'submitting' AND task_id IS NOT NULL"
"""True for an item that is being bought anew and still has its former task."""
_LOST: Final = f"iif(code = '{EXPIRED}', code, NULL)"
"""Keeps the code of lost results until they are found: without it none may be bought anew."""


@define(eq=False)
class Ledger(Connection):
    """An open ledger; one at a time in the world. Use it as ``async with Ledger(path)``."""

    async def __aenter__(self) -> Self:
        """Open it, making it if need be.

        What a process that is gone left in state ``submitting`` becomes ``uncertain``.

        Raises:
            LedgerError: It is in use, of a newer format, damaged, or cannot be written.
        """
        try:
            await self.open()
            await self._disown()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @committed
    def _disown(self) -> None:
        """What a process that is gone was submitting is uncertain."""
        loading.forget(self._db, _REPLACED)
        self._db.execute(
            "UPDATE items SET state = 'uncertain', code = 'submit_uncertain', ended_at = ?, message"
            " = 'the process ended while this was being submitted' WHERE state = 'submitting'",
            (time.time(),),
        )

    @committed
    def claim(
        self, api: str, fingerprint: Callable[[bytes], bytes] | None, *, replace_key: bool = False
    ) -> None:
        """Record which API and key its tasks belong to, or see that it is the same as before.

        As long as nothing was accepted, or may have been, any API and key may take it over.

        Args:
            api: The base URL, or another lasting name of the API.
            fingerprint: Makes the salted hash of the API key that is kept; None for an API
                without accounts.
            replace_key: Take the key for a new one of the same account.

        Raises:
            LedgerError: It belongs to another API, or another key.
        """
        owner = self._db.execute(
            "SELECT api, salt, key_digest FROM owner WHERE EXISTS (SELECT 1 FROM items WHERE "
            "task_id IS NOT NULL OR state IN ('submitting', 'uncertain') OR credits_before > 0)"
        ).fetchone()
        if owner is not None:
            before, salt, digest = owner
            if before != api:
                back = (
                    "run it with --emulator again"
                    if before == EMULATOR
                    else f"set EVOLINK_BASE_URL back to {before} (and leave out --emulator)"
                )
                raise LedgerError(
                    f"the ledger {self.path} belongs to {before}, this run is for {api}, which "
                    f"knows nothing of its tasks; choose another folder, or {back}",
                    path=self.path,
                )
            now = b"" if fingerprint is None else fingerprint(salt)
            if not replace_key and not hmac.compare_digest(digest or b"", now):
                raise LedgerError(
                    f"the ledger {self.path} belongs to another API key of {api}: another "
                    "account's key? Set EVOLINK_API_KEY back, choose another folder, or, if the "
                    "key was replaced by a new one of the same account, say so (new_key, "
                    "--new-key)",
                    path=self.path,
                )
        salt = secrets.token_bytes(16)
        self._db.execute("DELETE FROM owner")
        self._db.execute(
            "INSERT INTO owner VALUES (?, ?, ?)",
            (api, salt, None if fingerprint is None else fingerprint(salt)),
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

    @committed
    def invalid(self, after: int = 0, limit: int = 500) -> tuple[Invalid, ...]:
        """The bad lines of the input last read, from behind line *after* on."""
        sql = "SELECT line, reason FROM invalid WHERE line > ? ORDER BY line LIMIT ?"
        return tuple(Invalid(*row) for row in self._db.execute(sql, (after, limit)))

    # -- questions -------------------------------------------------------------------------

    async def loss(self) -> str | None:
        """``removed`` or ``replaced`` if its file has its name no more; None if it has."""
        return await to_thread(self._loss, self.path)

    @committed
    def page(
        self, *states: str, after: tuple[int, int] = (0, 0), limit: int = 64
    ) -> tuple[Item, ...]:
        """Items in one of *states* (of any, if none is named), in the order of the input.

        Queued and failed items whose line is gone are left out.

        Args:
            *states: Which.
            after: ``(line, number)`` of the last item already seen.
            limit: At most so many.
        """
        columns = ", ".join((*_COLUMNS, *(f"{name}_at" for name in _TIMES)))
        among = f"state IN ({', '.join('?' * len(states))}) AND" if states else ""
        rows = self._db.execute(
            f"SELECT {columns} FROM items WHERE {among} (line, number) > (?, ?) AND {_RELEVANT} "  # noqa: S608 - ours
            "ORDER BY line, number LIMIT ?",
            (*states, *after, limit),
        ).fetchall()
        return tuple(self._item(row) for row in rows)

    async def items(self, *states: str, limit: int = 64) -> AsyncGenerator[Item, None]:
        """All items in one of *states*, as `page` has them, *limit* of them in memory."""
        after = (0, 0)
        while page := await self.page(*states, after=after, limit=limit):
            for item in page:
                yield item
            after = (page[-1].line, page[-1].number)

    @committed
    def files(self, number: int) -> dict[int, File]:
        """The files of an item as they were last saved, by position from 1."""
        return self._files(number)

    @committed
    def counts(self) -> Counts:
        """The whole ledger in numbers."""

        def table(sql: str) -> dict[str, Any]:
            return dict(self._db.execute(sql).fetchall())

        def number(sql: str) -> Any:
            return self._db.execute(sql).fetchone()[0]

        return Counts(
            states=table(f"SELECT state, count(*) FROM items WHERE {_RELEVANT} GROUP BY state"),  # noqa: S608 - ours
            pictures=table(
                "SELECT model, sum(pictures) FROM items WHERE state = 'queued' AND wanted = 1 "
                "GROUP BY model"
            ),
            spent=number(
                # The API gives back what a failed item reserved, unless it says otherwise.
                "SELECT coalesce(sum(credits_before + coalesce(credits_used, "  # noqa: S608 - ours
                f"iif(state IN {_PAID}, credits_reserved, 0), 0)), 0) FROM items"
            ),
            unstated=table(
                "SELECT model, sum(pictures) FROM items WHERE credits_used IS NULL AND "  # noqa: S608 - ours
                f"credits_reserved IS NULL AND (state IN {_PAID} OR state = 'failed' AND code IN "
                f"('{EXPIRED}', '{NOT_FOUND}', 'no_results')) GROUP BY model"
            ),
            prices=table(
                # A failed item may have cost nothing: what it used is no price.
                "SELECT model, max(price) FROM (SELECT model, max(coalesce(credits_reserved, used),"
                " coalesce(used, credits_reserved)) / pictures AS price FROM (SELECT *, "
                "iif(state = 'failed', NULL, credits_used) AS used FROM items)) "
                "WHERE price IS NOT NULL GROUP BY model"
            ),
            uncertain=table(
                "SELECT model, sum(pictures) FROM items WHERE state = 'uncertain' GROUP BY model"
            ),
            retryable=number(f"SELECT count(*) FROM items WHERE {_FAILED} AND retryable = 1"),  # noqa: S608 - ours
            expired=number(f"SELECT count(*) FROM items WHERE {_GONE}"),  # noqa: S608 - ours
        )

    # -- changes of one item ---------------------------------------------------------------

    @committed
    def submitting(self, number: int, key: str) -> None:
        """Its POST may leave from now on, under this idempotency key.

        A failed item that is bought anew keeps its former task until its submit has an end.

        Raises:
            LedgerError: Its file is not the one others would open, another process may have
                the folder, or it cannot be written.
        """
        self._check_files()
        self._change(
            number,
            "state = 'submitting', idempotency_key = ?, submitting_at = ?, ended_at = NULL, "
            "code = iif(task_id IS NULL, NULL, code), "
            "message = iif(task_id IS NULL, NULL, message), retryable = 0",
            (key, time.time()),
            only=f"(state IN ('queued', 'uncertain', 'submitting') OR {_GONE})",
        )

    @committed
    def queued(self, number: int) -> None:
        """Nothing of this submit was accepted: it is queued, or has failed, as before."""
        now = time.time()
        self._change(
            number,
            "state = iif(task_id IS NULL, 'queued', 'failed'), idempotency_key = NULL, "
            "submitting_at = NULL, queued_at = ?, ended_at = iif(task_id IS NULL, NULL, ?)",
            (now, now),
            only=f"(state IN ('queued', 'submitting') OR {_GONE})",
        )

    @committed
    def uncertain(self, number: int, *, key: str | None, message: str) -> None:
        """Its submit may have been accepted; nobody knows its task."""
        loading.forget(self._db, f"number = {int(number)} AND {_REPLACED}")
        self._change(
            number,
            "state = 'uncertain', idempotency_key = coalesce(?, idempotency_key), "
            "code = 'submit_uncertain', message = ?, ended_at = ?",
            (key, message, time.time()),
        )

    @committed
    def submitted(
        self, number: int, *, key: str | None, task_id: str, reserved: float | None
    ) -> None:
        """It was accepted as *task_id*."""
        loading.forget(self._db, f"number = {int(number)} AND {_REPLACED}")
        self._change(
            number,
            "state = 'submitted', idempotency_key = coalesce(?, idempotency_key), code = NULL, "
            "message = NULL, task_id = ?, credits_reserved = ?, submitted_at = ?",
            (key, task_id, reserved, time.time()),
        )

    @committed
    def completed(
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
        stem: str | None
        (stem,) = self._db.execute("SELECT stem FROM items WHERE number = ?", (number,)).fetchone()
        if stem is None:
            taken = "SELECT 1 FROM items WHERE stem = ? COLLATE NOCASE AND number != ?"
            for stem in stems:
                if self._db.execute(taken, (stem, number)).fetchone() is None:
                    break
            else:
                stem = f"{stem}-{number}"
        self._change(
            number,
            f"state = 'completed', code = {_LOST}, message = NULL, snapshot = ?, "
            "stem = ?, credits_used = ?, completed_at = coalesce(completed_at, ?)",
            (snapshot, stem, used, time.time()),
        )
        return stem

    @committed
    def saved(self, number: int, files: Sequence[File]) -> None:
        """All its results are on disk."""
        now = time.time()
        self._change(
            number,
            "state = 'saved', code = NULL, message = NULL, saved_at = ?, ended_at = ?",
            (now, now),
        )
        self._db.execute("DELETE FROM files WHERE item = ?", (number,))
        self._add_files(number, dict(enumerate(files, 1)))

    @committed
    def damaged(self, number: int) -> None:
        """Its files are not what was saved: they must be downloaded again."""
        self._change(number, "state = 'completed', saved_at = NULL", ())

    @committed
    def unsaved(self, number: int, files: Mapping[int, File], message: str) -> None:
        """Not all its results are on disk, for that reason; these are, by position from 1."""
        code = f"code = coalesce({_LOST}, 'download_failed')"
        self._change(number, f"{code}, message = ?", (message,))
        self._add_files(number, files)

    @committed
    def failed(
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
        self._change(
            number,
            "state = 'failed', code = ?, message = ?, retryable = ?, ended_at = ?, "
            "credits_used = coalesce(?, credits_used, iif(?, credits_reserved, NULL), ?)",
            (code, message, retryable, time.time(), used, guess is not None, guess or None),
        )

    # -- changes of many items -------------------------------------------------------------

    @committed
    def requeue_failed(self) -> int:
        """Queue failed items of the input anew, those that are retryable."""
        return loading.requeue(self._db, f"{_FAILED} AND retryable")

    @committed
    def reattach_lost(self) -> None:
        """Look again at tasks of items of the input that the API did not know."""
        self._db.execute(
            "UPDATE items SET state = 'submitted', credits_used = NULL, ended_at = NULL "  # noqa: S608 - ours
            f"WHERE {_FAILED} AND code = '{NOT_FOUND}' AND task_id IS NOT NULL"
        )

    @committed
    def reopen_expired(self) -> None:
        """Look again for results of items of the input that had expired."""
        self._db.execute(
            "UPDATE items SET state = 'completed', ended_at = NULL "  # noqa: S608 - ours
            f"WHERE {_FAILED} AND code = '{EXPIRED}' AND snapshot IS NOT NULL"
        )

    # -- in the thread ---------------------------------------------------------------------

    def _item(self, row: tuple[Any, ...]) -> Item:
        values = dict(zip(_COLUMNS, row, strict=False))
        times = zip(_TIMES, row[len(_COLUMNS) :], strict=True)
        values["request"] = json.loads(values["request"])
        values["metadata"] = json.loads(values["metadata"] or "{}")
        values["snapshot"] = json.loads(values["snapshot"] or "null")
        return Item(
            **values,
            times={name: at for name, at in times if at is not None},
            files=tuple(self._files(values["number"]).values()),
        )

    def _files(self, number: int) -> dict[int, File]:
        rows = self._db.execute(
            "SELECT position, name, sha256, bytes FROM files WHERE item = ? ORDER BY position",
            (number,),
        )
        return {k: File(name=name, sha256=sha256, bytes=size) for k, name, sha256, size in rows}

    def _add_files(self, number: int, files: Mapping[int, File]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            [(number, k, f.name, f.sha256, f.bytes) for k, f in files.items()],
        )

    def _change(
        self, number: int, values: str, given: tuple[Any, ...], *, only: str = "true"
    ) -> None:
        """Give the columns of one item, which must be among *only*, these *values*."""
        sql = f"UPDATE items SET {values} WHERE number = ? AND {only}"  # noqa: S608 - ours
        if self._db.execute(sql, (*given, number)).rowcount != 1:
            raise AssertionError(number)  # a mistake of ours, which must not cost money
