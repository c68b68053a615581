"""The memory of a batch: an SQLite file beside its pictures. Knows no HTTP.

One thread owns the connection; the event loop never waits for a disk. Each change of an
item's state is one ``await`` that returns once the change is on disk; changes that wait at
the same time share one commit, and so one flush.

The states of an item, in the order of a life without trouble::

    queued -> submitting -> submitted -> completed -> saved
                  |             |            |
              uncertain      failed       failed
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from attrs import define, field, frozen

from evolink_async.errors import LedgerError

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
    "migrate",
]

T = TypeVar("T")
Fingerprint = Callable[[bytes], bytes]
"""Makes a salted hash of an API key."""

LEDGER: Final = "ledger.sqlite3"
EMULATOR: Final = "emulator"
"""The name of every embedded emulator: each has another port."""
_LOCK: Final = "ledger.lock"
_RESERVE: Final = "ledger.reserve"
_RESERVED: Final = 1 << 20
"""Bytes kept for the ledger: on a full disk, what was paid for can still be recorded."""
_PATIENCE: Final = (0.0, 0.1, 0.3, 0.6)
"""Seconds to wait for room: a download that fills the disk removes what it wrote."""
_APPLICATION: Final = 0x45764C6B
"""SQLite's ``application_id`` of our files: "EvLk"."""
_KEPT_OUT: Final = (
    "kept other processes out; nothing more is submitted: see that no other process uses the "
    "folder, then run the same batch again"
)
_KEPT_NEWS: Final = (
    "held what the ledger was told last; nothing more is submitted: see that nobody clears the "
    "folder, then run the same batch again"
)
_CHUNK: Final = 500
"""Input lines per transaction while reading: bounds memory."""
_GROUP: Final = 64
"""Most changes that share one commit: those who wait for it wake in one turn of the loop."""

_CREATE: Final = """
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    identity TEXT NOT NULL UNIQUE,
    user_id TEXT,
    digest TEXT NOT NULL,
    line INTEGER NOT NULL,
    wanted INTEGER NOT NULL DEFAULT 1,
    request TEXT NOT NULL,
    metadata TEXT,
    model TEXT NOT NULL,
    pictures INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    idempotency_key TEXT,
    task_id TEXT,
    snapshot TEXT,
    stem TEXT,
    code TEXT,
    message TEXT,
    retryable INTEGER NOT NULL DEFAULT 0,
    credits_reserved REAL,
    credits_used REAL,
    credits_before REAL NOT NULL DEFAULT 0,
    queued_at REAL NOT NULL,
    submitting_at REAL,
    submitted_at REAL,
    completed_at REAL,
    saved_at REAL,
    ended_at REAL
);
CREATE INDEX items_by_state ON items (state, line, number);
CREATE INDEX items_by_line ON items (line, number);
CREATE UNIQUE INDEX items_by_stem ON items (stem COLLATE NOCASE) WHERE stem IS NOT NULL;
CREATE TABLE files (
    item INTEGER NOT NULL REFERENCES items (number),
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (item, position)
) WITHOUT ROWID;
CREATE TABLE incoming (
    line INTEGER PRIMARY KEY,
    user_id TEXT,
    digest TEXT NOT NULL,
    request TEXT NOT NULL,
    metadata TEXT,
    model TEXT NOT NULL,
    pictures INTEGER NOT NULL
);
CREATE TABLE invalid (line INTEGER PRIMARY KEY, reason TEXT NOT NULL);
"""
_OWNER: Final = """
CREATE TABLE owner (
    api TEXT NOT NULL,
    salt BLOB NOT NULL,
    key_digest BLOB
);
"""
_OUTPUTS: Final = """
CREATE TABLE outputs (
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (name, sha256)
) WITHOUT ROWID;
INSERT INTO outputs (name, sha256)
    SELECT column1, '' FROM (VALUES ('manifest.jsonl'), ('gallery.html'))
    WHERE EXISTS (SELECT 1 FROM items);
"""
"""An empty SHA-256: formats 1 and 2 did not record what they wrote under that name."""
_STEPS: Final = (_CREATE, _OWNER, _OUTPUTS)
"""Step k makes format k+1 of format k; a ledger's ``user_version`` is its format."""


@frozen(kw_only=True)
class Entry:
    """One good line of the input.

    Attributes:
        line: Its number, from 1.
        user_id: The id the user gave it, if any.
        digest: A hash of the request it makes.
        request: The request, as JSON.
        metadata: What else the line holds, as JSON; None for nothing.
        model: What the price depends on.
        pictures: How many results are ordered.
    """

    line: int
    user_id: str | None
    digest: str
    request: str
    metadata: str | None
    model: str
    pictures: int


@frozen
class Invalid:
    """One bad line of the input: its number, from 1, and what is wrong with it."""

    line: int
    reason: str


@frozen(kw_only=True)
class Loaded:
    """What reading the input came to: numbers of lines."""

    valid: int
    invalid: int


@frozen(kw_only=True)
class File:
    """A saved result: its name in the folder, SHA-256 in hexadecimal, size in bytes."""

    name: str
    sha256: str
    bytes: int


@frozen(kw_only=True)
class Item:
    """One item as the ledger has it; see the columns of the table for the times."""

    number: int
    identity: str
    user_id: str | None
    line: int
    wanted: bool
    request: Mapping[str, Any] = field(hash=False)
    metadata: Mapping[str, Any] = field(hash=False)
    model: str
    pictures: int
    state: str
    idempotency_key: str | None = None
    task_id: str | None = None
    snapshot: Mapping[str, Any] | None = field(default=None, hash=False)
    stem: str | None = None
    code: str | None = None
    message: str | None = None
    retryable: bool = False
    credits_reserved: float | None = None
    credits_used: float | None = None
    times: Mapping[str, float] = field(factory=dict, hash=False)
    files: tuple[File, ...] = ()

    @property
    def place(self) -> str:
        """Where it stands in the input, in words."""
        return f"line {self.line}" if self.wanted else "an item no longer in the input"


@frozen(kw_only=True)
class Counts:
    """The whole ledger in numbers.

    Attributes:
        states: Items by state; those that have left the input count once paid for.
        pictures: Results ordered by items not submitted yet, by model.
        spent: Credits charged, or reserved and not yet settled, over all runs, as far as the
            API has said it.
        unstated: Results ordered by items that are charged, or will be, without the API
            having said how much, by model.
        prices: Highest price of one result seen, by model.
        doubtful: Results ordered by uncertain items, by model: they may have been charged.
        retryable: Failed items that may be retried.
        expired: Failed items whose results were lost by waiting too long.
    """

    states: Mapping[str, int] = field(hash=False)
    pictures: Mapping[str, int] = field(hash=False)
    spent: float
    unstated: Mapping[str, int] = field(hash=False)
    prices: Mapping[str, float] = field(hash=False)
    doubtful: Mapping[str, int] = field(hash=False)
    retryable: int
    expired: int


_COLUMNS: Final = (
    "number, identity, user_id, line, wanted, request, metadata, model, pictures, state, "
    "idempotency_key, task_id, snapshot, stem, code, message, retryable, credits_reserved, "
    "credits_used, queued_at, submitting_at, submitted_at, completed_at, saved_at, ended_at"
)
_TIMES: Final = ("queued", "submitting", "submitted", "completed", "saved", "ended")
_PAID: Final = "('submitted', 'completed', 'saved')"
_RELEVANT: Final = "(wanted = 1 OR state NOT IN ('queued', 'failed'))"
"""An item whose line is gone counts only if it has cost, or may have cost, something."""


# ---------------------------------------------------------------------------------------------
# The thread


@define(eq=False)
class _Job:
    """Something to do with the connection, and whom to tell."""

    work: Callable[[sqlite3.Connection], Any]
    done: asyncio.Future[Any]
    alone: bool = False
    result: Any = None
    error: BaseException | None = None


@define(eq=False)
class _Worker:
    """The thread that owns the connection."""

    _path: Path
    _jobs: queue.SimpleQueue[_Job | None] = field(factory=queue.SimpleQueue, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _opened: dict[Path, tuple[int, int] | None] = field(factory=dict, init=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="evolink-ledger", daemon=True)
        self._thread.start()

    def submit(
        self, work: Callable[[sqlite3.Connection], T], *, alone: bool = False
    ) -> asyncio.Future[T]:
        """Have *work* done: in a transaction shared with others, or *alone* without one."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(work, done, alone))
        return done

    def loss(self) -> str | None:
        """What became of the name of the open ledger, in a word; None if it still has it."""
        now = _file_id(self._path)
        if now is None:
            return "removed"
        return None if now == self._opened.get(self._path) else "replaced"

    def check_files(self) -> None:
        """See that others would open the same ledger, and be kept out by the same lock."""
        if (loss := self.loss()) is not None:
            raise LedgerError(
                f"the ledger {self._path} was {loss} while it was in use; nothing more is "
                "submitted, for a new one knows nothing of what was paid for: see the report "
                "before the batch is run again",
                path=self._path,
            )
        for path, why in ((self._lock_path, _KEPT_OUT), (self._log_path, _KEPT_NEWS)):
            if self._is_other(path):
                raise LedgerError(f"{path} was removed or replaced while it {why}", path=self._path)

    @property
    def _lock_path(self) -> Path:
        return self._path.with_name(_LOCK)

    @property
    def _log_path(self) -> Path:
        return self._path.with_name(f"{self._path.name}-wal")

    def _note(self, path: Path) -> None:
        self._opened[path] = _file_id(path)

    def _is_other(self, path: Path) -> bool:
        """Whether *path* is not the file any more that was opened under that name."""
        now = _file_id(path)
        return path in self._opened and (now is None or now != self._opened[path])

    def leave(self) -> None:
        """End the thread when it next can; nobody waits for it."""
        self._thread = None
        self._jobs.put(None)

    async def stop(self) -> None:
        """Do what is waiting, then end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            # Not to_thread: a cancelled caller must not leave the file open behind it.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, thread.join))

    def _run(self) -> None:
        lock: sqlite3.Connection | None = None
        connection: sqlite3.Connection | None = None
        opened = False
        while (job := self._jobs.get()) is not None:
            group = [job] if job.alone else self._group(job)
            try:
                if not opened:
                    lock = _lock(self._path)
                    self._note(self._lock_path)
                    connection = _connect(self._path)
                    self._note(self._path)
                    if self._log_path.exists():  # SQLite keeps none on some network drives
                        self._note(self._log_path)
                    opened = True
                    _reserve(self._path)
                if connection is not None:
                    _do_with_room(connection, group, self._path)
            except BaseException as exc:  # noqa: BLE001 - it belongs to whoever waits
                for each in group:
                    each.error = _ours(exc, self._path)
            _tell(group)
        if opened:
            _release(self._path)
        for opened_one in (connection, lock):
            if opened_one is not None:
                with contextlib.suppress(sqlite3.Error):
                    opened_one.close()

    def _group(self, first: _Job) -> list[_Job]:
        """*first* and what else is waiting now, up to something that must be done alone."""
        group = [first]
        while len(group) < _GROUP:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None or job.alone:
                self._jobs.put(job)  # nobody queues behind it: its caller waits for the rest
                break
            group.append(job)
        return group


def _do(connection: sqlite3.Connection, group: Sequence[_Job]) -> None:
    """Do the jobs of *group* in one transaction: all of it, or nothing."""
    if group[0].alone:
        group[0].result = group[0].work(connection)
        return
    with _transaction(connection):
        for job in group:
            job.result = job.work(connection)


def _do_with_room(connection: sqlite3.Connection, group: Sequence[_Job], path: Path) -> None:
    """`_do`; if the disk is full, once more in the room kept for that."""
    for pause in _PATIENCE:
        try:
            _do(connection, group)
        except sqlite3.OperationalError as exc:
            full = getattr(exc, "sqlite_errorname", "").startswith("SQLITE_FULL")
            if not full or group[0].alone:
                raise
            _release(path)
            time.sleep(pause)
        else:
            return
    _do(connection, group)


def _reserve(path: Path) -> None:
    """Take the room that is to be kept; a disk without it is found out soon enough."""
    reserve = path.with_name(_RESERVE)
    with contextlib.suppress(OSError):
        if not reserve.exists() or (_is_reserve(reserve) and reserve.stat().st_size != _RESERVED):
            reserve.write_bytes(bytes(_RESERVED))


def _release(path: Path) -> None:
    """Give that room back."""
    reserve = path.with_name(_RESERVE)
    with contextlib.suppress(OSError):
        if _is_reserve(reserve):
            reserve.unlink()


def _is_reserve(path: Path) -> bool:
    """False for a file of somebody else."""
    return path.stat().st_size <= _RESERVED and not any(path.read_bytes())


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _tell(group: Sequence[_Job]) -> None:
    """Wake those who wait, all with one call into their loop."""
    with contextlib.suppress(RuntimeError):  # their loop is closed: nobody waits any more
        group[0].done.get_loop().call_soon_threadsafe(_settle, group)


def _settle(group: Sequence[_Job]) -> None:
    for job in group:
        if job.done.cancelled():
            continue
        if job.error is not None:
            job.done.set_exception(job.error)
        else:
            job.done.set_result(job.result)


def _ours(exc: BaseException, path: Path) -> BaseException:
    if not isinstance(exc, sqlite3.Error):
        return exc
    error = LedgerError(f"the ledger {path} cannot be used: {exc}{_advice(exc)}", path=path)
    error.__cause__ = exc
    return error


def _advice(exc: sqlite3.Error) -> str:
    name = getattr(exc, "sqlite_errorname", "")
    known = {
        "SQLITE_FULL": "; make room on the disk and run the same command again",
        "SQLITE_NOTADB": "; it is not a ledger, choose another folder",
        "SQLITE_CORRUPT": "; restore it from a copy, or choose another folder",
        "SQLITE_READONLY": "; make it writable",
        "SQLITE_CANTOPEN": "; make the folder writable, or choose another one",
        "SQLITE_BUSY": "; another program is writing to it",
    }
    return next((text for start, text in known.items() if name.startswith(start)), "")


# ---------------------------------------------------------------------------------------------
# Opening


def _lock(path: Path) -> sqlite3.Connection:
    """Hold the folder for this process; the system lets go when the process ends, however.

    SQLite's own file locks, of an empty database, are the lock that works everywhere. The
    ledger itself stays readable for others.
    """
    lock = sqlite3.connect(path.with_name(_LOCK), timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as exc:
        lock.close()
        if getattr(exc, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
            raise LedgerError(
                f"the ledger {path} is in use by another process; wait until it has finished, "
                "or stop it",
                path=path,
            ) from exc
        raise
    return lock


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        _check_format(connection, path)
        connection.executescript(
            # The two for macOS, whose ordinary flush stops at the drive's cache.
            "PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON;"
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
            "PRAGMA journal_size_limit = 16777216; PRAGMA foreign_keys = ON;"
        )
        migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    version = _pragma(connection, "user_version")
    foreign = version and _pragma(connection, "application_id") != _APPLICATION
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if foreign or (tables and not version):
        raise LedgerError(f"{path} is not a ledger; choose another folder", path=path)
    if version > len(_STEPS):
        raise LedgerError(
            f"the ledger {path} has format {version}, this version of evolink-async knows "
            f"formats up to {len(_STEPS)}; upgrade evolink-async",
            path=path,
        )


def migrate(connection: sqlite3.Connection, steps: Sequence[str] = _STEPS) -> None:
    """Bring a ledger from its format to that of *steps*, each step whole or not at all."""
    for version in range(_pragma(connection, "user_version"), len(steps)):
        try:
            connection.executescript(
                f"BEGIN; {steps[version]}; PRAGMA application_id = {_APPLICATION};"
                f"PRAGMA user_version = {version + 1}; COMMIT;"
            )
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


# ---------------------------------------------------------------------------------------------
# The ledger


@define(eq=False)
class Ledger:
    """An open ledger; one at a time in the world. Use it as ``async with Ledger(folder)``."""

    path: Path
    _worker: _Worker = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._worker = _Worker(self.path)

    async def __aenter__(self) -> Self:
        """Open it, making or migrating it if need be.

        What a process that is gone left in state ``submitting`` becomes ``uncertain``.

        Raises:
            LedgerError: It is in use, of a newer format, damaged, or cannot be written.
        """
        self._worker.start()
        try:
            await self._do(_disown)
        except BaseException:
            await self._worker.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._worker.stop()

    async def _do(self, work: Callable[[sqlite3.Connection], T], *, alone: bool = False) -> T:
        return await self._worker.submit(work, alone=alone)

    async def claim(
        self, api: str, fingerprint: Fingerprint | None, *, replace_key: bool = False
    ) -> None:
        """Record whom the tasks in it belong to, or see that it is the same as before.

        As long as nothing was accepted, or may have been, it belongs to whoever comes.

        Args:
            api: The base URL, or another lasting name of the API.
            fingerprint: A salted hash of the API key, which is kept; None for an API without
                accounts.
            replace_key: Take the key for a new one of the same account.

        Raises:
            LedgerError: It belongs to another API, or another key.
        """
        await self._do(
            lambda connection: _claim(connection, self.path, api, fingerprint, replace_key)
        )

    # -- the input -------------------------------------------------------------------------

    async def load(self, lines: Iterable[Entry | Invalid], *, skip_invalid: bool) -> Loaded:
        """Make *lines* the input of this batch, if all are good or bad ones may be skipped.

        *lines* is iterated in the ledger's thread. Items are recognised by their user's id,
        or by their request and how many equal ones stand above them; lines that were edited
        take over equal items (see `_adopt`). Known ones keep their state, the rest is
        queued. If none is good, the input stays what it was.

        Raises:
            LedgerError: It cannot be written.
        """
        abandoned = threading.Event()
        work = partial(_load, lines=_unless(abandoned, lines), skip_invalid=skip_invalid)
        try:
            return await self._do(work, alone=True)
        except asyncio.CancelledError:
            # The thread may be waiting for a line that never comes, as from a terminal.
            abandoned.set()
            self._worker.leave()
            raise

    async def invalid(self, after: int = 0, limit: int = 500) -> tuple[Invalid, ...]:
        """The bad lines of the input last read, from behind line *after* on."""
        sql = "SELECT line, reason FROM invalid WHERE line > ? ORDER BY line LIMIT ?"
        return await self._do(
            lambda connection: tuple(
                Invalid(*row) for row in connection.execute(sql, (after, limit))
            )
        )

    # -- what else is in the folder --------------------------------------------------------

    async def outputs(self, name: str) -> frozenset[str]:
        """The SHA-256 a file of that name beside the pictures has if a batch wrote it.

        One of them is empty if an older version, which did not record it, may have written one.
        """
        sql = "SELECT sha256 FROM outputs WHERE name = ?"
        return await self._do(
            lambda connection: frozenset(
                sha256 for (sha256,) in connection.execute(sql, (name,)).fetchall()
            )
        )

    async def record_outputs(self, name: str, digests: Iterable[str]) -> None:
        """From now on a file of that name with one of these SHA-256 is ours, others are not."""
        rows = [(name, digest) for digest in digests]
        await self._do(lambda connection: _record_outputs(connection, name, rows))

    # -- looking ---------------------------------------------------------------------------

    async def loss(self) -> str | None:
        """``removed`` or ``replaced`` if its file has its name no more; None if it has."""
        return await asyncio.to_thread(self._worker.loss)

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
        return await self._do(lambda connection: _page(connection, states, after, limit))

    async def state(self, number: int) -> str:
        """The state it is in now."""
        sql = "SELECT state FROM items WHERE number = ?"
        return await self._do(
            lambda connection: str(connection.execute(sql, (number,)).fetchone()[0])
        )

    async def counts(self) -> Counts:
        """The whole ledger in numbers."""
        return await self._do(_counts)

    # -- changes ---------------------------------------------------------------------------

    async def submitting(self, number: int, key: str) -> None:
        """Its POST may leave from now on, under this idempotency key.

        Raises:
            LedgerError: Its file is not the one others would open, another process may have
                the folder, or it cannot be written.
        """
        await asyncio.to_thread(self._worker.check_files)
        await self._change(
            "UPDATE items SET state = 'submitting', idempotency_key = ?, submitting_at = ?, "
            "code = iif(task_id IS NULL, NULL, code), "
            "message = iif(task_id IS NULL, NULL, message), retryable = 0 WHERE number = ? "
            "AND state IN ('queued', 'uncertain', 'submitting')",
            (key, time.time(), number),
        )

    async def queued(self, number: int) -> None:
        """Nothing of this submit was accepted: it may be submitted anew, under a new key."""
        await self._change(
            "UPDATE items SET state = 'queued', idempotency_key = NULL, submitting_at = NULL, "
            "queued_at = ? WHERE number = ? AND state IN ('queued', 'submitting')",
            (time.time(), number),
        )

    async def replacing(self, number: int) -> None:
        """It failed, and is to be bought anew; until a submit may have left it keeps all it has."""
        await self._change(
            "UPDATE items SET state = 'queued', queued_at = ?, ended_at = NULL WHERE number = ?",
            (time.time(), number),
        )

    async def restore(self) -> None:
        """What was to be bought anew, and was not, has failed as before."""
        await self._do(_restore)

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
        self, number: int, *, snapshot: str, used: float | None, stems: Sequence[str]
    ) -> str:
        """Its results may be downloaded.

        Returns:
            The beginning of its files' names: the one it has, else the first of *stems*
            that no other item has, in whatever case.
        """
        return await self._do(
            lambda connection: _completed(connection, number, snapshot, used, stems)
        )

    async def saved(self, number: int, files: Sequence[File]) -> None:
        """All its results are on disk."""
        await self._do(lambda connection: _saved(connection, number, files))

    async def damaged(self, number: int) -> None:
        """Its files are not what was saved: they must be downloaded again."""
        await self._change(
            "UPDATE items SET state = 'completed', saved_at = NULL WHERE number = ?", (number,)
        )

    async def unsaved(self, number: int, files: Mapping[int, File], message: str) -> None:
        """Not all its results are on disk, for that reason; these are, by position from 1."""
        await self._do(lambda connection: _unsaved(connection, number, files, message))

    async def files(self, number: int) -> dict[int, File]:
        """Its files as they were last saved, by position from 1."""
        return await self._do(lambda connection: _files(connection, number))

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

        *guess*: nobody says that it was given back, so it cost what is known last, or, if
        nothing is, so much.
        """
        await self._change(
            "UPDATE items SET state = 'failed', code = ?, message = ?, retryable = ?, "
            "credits_used = coalesce(?, credits_used, iif(?, credits_reserved, NULL), ?), "
            "ended_at = ? WHERE number = ?",
            (code, message, retryable, used, guess is not None, guess or None, time.time(), number),
        )

    async def requeue_failed(self) -> int:
        """Queue failed items of the input anew, those that are retryable."""
        return await self._do(_requeue_failed)

    async def reattach(self, code: str) -> int:
        """Look again at the tasks of items of the input that failed with *code*."""
        return await self._do(
            lambda connection: (
                connection.execute(
                    "UPDATE items SET state = 'submitted', credits_used = NULL, ended_at = NULL "
                    "WHERE state = 'failed' AND wanted = 1 AND code = ? AND task_id IS NOT NULL",
                    (code,),
                ).rowcount
            )
        )

    async def reopen(self, code: str) -> int:
        """Look again for the results of items of the input that failed with *code*."""
        return await self._do(
            lambda connection: (
                connection.execute(
                    "UPDATE items SET state = 'completed', ended_at = NULL WHERE state = 'failed' "
                    "AND wanted = 1 AND code = ? AND snapshot IS NOT NULL",
                    (code,),
                ).rowcount
            )
        )

    async def _replace(self, sql: str, values: tuple[Any, ...]) -> None:
        """A change by which what an item was bought for before is gone."""
        await self._do(lambda connection: _replace(connection, sql, values))

    async def _change(self, sql: str, values: tuple[Any, ...]) -> None:
        await self._do(lambda connection: _once(connection, sql, values))


_QUEUED: Final = (
    "UPDATE items SET state = 'queued', idempotency_key = NULL, task_id = NULL, snapshot = NULL, "
    "stem = NULL, code = NULL, message = NULL, retryable = 0, credits_before = credits_before + "
    "coalesce(credits_used, 0), credits_reserved = NULL, credits_used = NULL, queued_at = ?, "
    "submitting_at = NULL, submitted_at = NULL, completed_at = NULL, ended_at = NULL "
    "WHERE number = ?"
)
"""What it has cost so far is kept apart: the ledger's sums stay whole."""


_REPLACED: Final = "state IN ('queued', 'submitting') AND task_id IS NOT NULL"
"""It is to be bought anew, and has what it was bought for before."""


def _replace(connection: sqlite3.Connection, sql: str, values: tuple[Any, ...]) -> None:
    _forget(connection, f"number = {int(values[-1])} AND {_REPLACED}")
    _once(connection, sql, values)


def _forget(connection: sqlite3.Connection, which: str) -> None:
    connection.execute(
        f"DELETE FROM files WHERE item IN (SELECT number FROM items WHERE {which})"  # noqa: S608 - ours
    )
    connection.execute(
        "UPDATE items SET credits_before = credits_before + coalesce(credits_used, 0), "  # noqa: S608 - ours
        "credits_used = NULL, credits_reserved = NULL, task_id = NULL, snapshot = NULL, "
        f"stem = NULL, submitted_at = NULL, completed_at = NULL WHERE {which}"
    )


def _restore(connection: sqlite3.Connection) -> None:
    connection.execute(
        "UPDATE items SET state = 'failed', ended_at = ? "
        "WHERE state = 'queued' AND task_id IS NOT NULL",
        (time.time(),),
    )


def _once(connection: sqlite3.Connection, sql: str, values: tuple[Any, ...]) -> None:
    if connection.execute(sql, values).rowcount != 1:
        raise AssertionError(values)  # a mistake of ours, which must not cost money


_OWNED: Final = (
    "SELECT 1 FROM items WHERE task_id IS NOT NULL OR state IN ('submitting', 'uncertain') "
    "OR credits_before > 0"
)
"""Something that only one API knows of, or may know of."""


def _claim(
    connection: sqlite3.Connection,
    path: Path,
    api: str,
    fingerprint: Fingerprint | None,
    replace_key: bool,  # noqa: FBT001 - private
) -> None:
    owner = connection.execute("SELECT api, salt, key_digest FROM owner").fetchone()
    if owner is not None and connection.execute(_OWNED).fetchone() is not None:
        before, salt, digest = owner
        if before != api:
            raise _other_api(path, before, api)
        if not replace_key and not _same_key(digest, fingerprint, salt):
            raise LedgerError(
                f"the ledger {path} belongs to another API key of {api}: another account's key? "
                "Set EVOLINK_API_KEY back, choose another folder, or, if the key was replaced by "
                "a new one of the same account, say so (new_key, --new-key)",
                path=path,
            )
    salt = secrets.token_bytes(16)
    connection.execute("DELETE FROM owner")
    connection.execute(
        "INSERT INTO owner (api, salt, key_digest) VALUES (?, ?, ?)",
        (api, salt, None if fingerprint is None else fingerprint(salt)),
    )


def _other_api(path: Path, before: str, now: str) -> LedgerError:
    back = (
        "run it with --emulator again"
        if before == EMULATOR
        else f"set EVOLINK_BASE_URL back to {before} (and leave out --emulator)"
    )
    return LedgerError(
        f"the ledger {path} belongs to {before}, this run is for {now}, which knows nothing of "
        f"its tasks; choose another folder, or {back}",
        path=path,
    )


def _same_key(digest: bytes | None, fingerprint: Fingerprint | None, salt: bytes) -> bool:
    if digest is None or fingerprint is None:
        return digest is None and fingerprint is None
    return hmac.compare_digest(digest, fingerprint(salt))


def _disown(connection: sqlite3.Connection) -> None:
    _restore(connection)
    _forget(connection, f"state = 'submitting' AND {_REPLACED}")
    connection.execute(
        "UPDATE items SET state = 'uncertain', code = 'submit_uncertain', ended_at = ?, "
        "message = 'the process ended while this was being submitted' WHERE state = 'submitting'",
        (time.time(),),
    )


_LOST: Final = "iif(code = 'results_expired', code, NULL)"
"""That its results were lost is kept until they are found: only then may it be bought anew."""


def _completed(
    connection: sqlite3.Connection,
    number: int,
    snapshot: str,
    used: float | None,
    stems: Sequence[str],
) -> str:
    stem: str | None = connection.execute(
        "SELECT stem FROM items WHERE number = ?", (number,)
    ).fetchone()[0]
    taken = "SELECT 1 FROM items WHERE stem = ? COLLATE NOCASE AND number != ?"
    if stem is None:
        free = (s for s in stems if connection.execute(taken, (s, number)).fetchone() is None)
        stem = next(free, f"{stems[-1]}-{number}")
    _once(
        connection,
        f"UPDATE items SET state = 'completed', code = {_LOST}, message = NULL, snapshot = ?, "  # noqa: S608 - ours
        "stem = ?, credits_used = ?, completed_at = coalesce(completed_at, ?) WHERE number = ?",
        (snapshot, stem, used, time.time(), number),
    )
    return stem


def _saved(connection: sqlite3.Connection, number: int, files: Sequence[File]) -> None:
    now = time.time()
    _once(
        connection,
        "UPDATE items SET state = 'saved', code = NULL, message = NULL, saved_at = ?, "
        "ended_at = ? WHERE number = ?",
        (now, now, number),
    )
    connection.execute("DELETE FROM files WHERE item = ?", (number,))
    connection.executemany(
        "INSERT INTO files (item, position, name, sha256, bytes) VALUES (?, ?, ?, ?, ?)",
        [(number, k, f.name, f.sha256, f.bytes) for k, f in enumerate(files, 1)],
    )


def _unsaved(
    connection: sqlite3.Connection, number: int, files: Mapping[int, File], message: str
) -> None:
    _once(
        connection,
        f"UPDATE items SET code = coalesce({_LOST}, 'download_failed'), message = ? "  # noqa: S608 - ours
        "WHERE number = ?",
        (message, number),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO files (item, position, name, sha256, bytes) VALUES (?, ?, ?, ?, ?)",
        [(number, k, f.name, f.sha256, f.bytes) for k, f in files.items()],
    )


def _record_outputs(
    connection: sqlite3.Connection, name: str, rows: Sequence[tuple[str, str]]
) -> None:
    connection.execute("DELETE FROM outputs WHERE name = ?", (name,))
    connection.executemany("INSERT INTO outputs (name, sha256) VALUES (?, ?)", rows)


def _requeue_failed(connection: sqlite3.Connection) -> int:
    # What may be retried has failed before there was anything to save.
    return connection.execute(
        _QUEUED.replace("WHERE number = ?", "WHERE state = 'failed' AND wanted = 1 AND retryable"),
        (time.time(),),
    ).rowcount


# ---------------------------------------------------------------------------------------------
# Reading the input


class _AbandonedError(Exception):
    """Nobody wants the input any more."""


def _unless(abandoned: threading.Event, lines: Iterable[T]) -> Iterator[T]:
    for line in lines:
        if abandoned.is_set():
            raise _AbandonedError
        yield line


def _load(
    connection: sqlite3.Connection,
    *,
    lines: Iterable[Entry | Invalid],
    skip_invalid: bool,
) -> Loaded:
    with _transaction(connection):
        connection.execute("DELETE FROM incoming")
        connection.execute("DELETE FROM invalid")
    iterator = iter(lines)
    while chunk := list(islice(iterator, _CHUNK)):
        with _transaction(connection):
            _take(connection, chunk)
    with _transaction(connection):
        _find_conflicts(connection)
    valid, invalid = (
        connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - ours
        for table in ("incoming", "invalid")
    )
    if valid and (skip_invalid or not invalid):
        with _transaction(connection):
            _merge(connection)
    return Loaded(valid=valid, invalid=invalid)


def _take(connection: sqlite3.Connection, chunk: Sequence[Entry | Invalid]) -> None:
    connection.executemany(
        "INSERT INTO incoming (line, user_id, digest, request, metadata, model, pictures) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (e.line, e.user_id, e.digest, e.request, e.metadata, e.model, e.pictures)
            for e in chunk
            if isinstance(e, Entry)
        ],
    )
    connection.executemany(
        "INSERT INTO invalid (line, reason) VALUES (?, ?)",
        [(e.line, e.reason) for e in chunk if isinstance(e, Invalid)],
    )


def _find_conflicts(connection: sqlite3.Connection) -> None:
    """Lines whose id is taken, above or by something already paid for, are bad ones."""
    connection.execute(
        """
        INSERT INTO invalid
        SELECT line, 'id: it is the id of line ' || first || ', too; each line needs its own'
        FROM (SELECT line, min(line) OVER (PARTITION BY user_id) AS first
              FROM incoming WHERE user_id IS NOT NULL)
        WHERE line > first
        """
    )
    connection.execute(
        """
        INSERT OR IGNORE INTO invalid
        SELECT incoming.line, 'id: it is the id of an item that was already submitted with '
            || 'another request; give the changed line a new id'
        FROM incoming JOIN items ON items.identity = 'id:' || incoming.user_id
        WHERE items.digest != incoming.digest AND items.state NOT IN ('queued', 'failed')
        """
    )
    connection.execute("DELETE FROM incoming WHERE line IN (SELECT line FROM invalid)")


_MATCH: Final = """
CREATE TEMP TABLE lines AS
    SELECT line, user_id, digest, CASE WHEN user_id IS NOT NULL THEN 'id:' || user_id
        ELSE 'sha256:' || digest || ':' || row_number() OVER
             (PARTITION BY user_id IS NULL, digest ORDER BY line) END AS identity
    FROM incoming;
CREATE INDEX temp.lines_by_identity ON lines (identity);
CREATE TEMP TABLE edited AS
    SELECT DISTINCT digest FROM items WHERE identity NOT IN (SELECT identity FROM lines)
    INTERSECT SELECT digest FROM lines;
CREATE INDEX temp.edited_by_digest ON edited (digest);
CREATE TEMP TABLE free AS
    SELECT identity, user_id, digest, user_id IS NULL AS plain,
        row_number() OVER (PARTITION BY digest, user_id IS NULL ORDER BY line) AS k
    FROM lines WHERE digest IN (SELECT digest FROM edited)
        AND (user_id IS NULL OR identity NOT IN (SELECT identity FROM items));
CREATE INDEX temp.free_by_digest ON free (digest, plain, k);
CREATE TEMP TABLE spare AS
    SELECT number, digest, user_id, line, row_number() OVER (
        PARTITION BY digest ORDER BY CASE state WHEN 'saved' THEN 0 WHEN 'completed' THEN 1
            WHEN 'submitted' THEN 2 WHEN 'failed' THEN 4 WHEN 'queued' THEN 5 ELSE 3 END,
            user_id IS NOT NULL, line, number) AS place
    FROM items WHERE digest IN (SELECT digest FROM edited)
        AND (user_id IS NULL OR identity NOT IN (SELECT identity FROM lines));
CREATE TEMP TABLE taken AS
    SELECT number, digest, line, 1 AS plain FROM spare
    WHERE place <= (SELECT count(*) FROM free WHERE free.digest = spare.digest AND plain);
INSERT INTO taken
    SELECT number, digest, line, 0 FROM (
        SELECT *, row_number() OVER (PARTITION BY digest ORDER BY place) AS next
        FROM spare WHERE user_id IS NULL AND number NOT IN (SELECT number FROM taken)) AS rest
    WHERE next <= (SELECT count(*) FROM free WHERE free.digest = rest.digest AND NOT plain);
CREATE TEMP TABLE matched AS
    SELECT number, identity, free.user_id AS user_id FROM (
        SELECT *, row_number() OVER (PARTITION BY digest, plain ORDER BY line, number) AS k
        FROM taken) AS own
    JOIN free ON free.digest = own.digest AND free.plain = own.plain AND free.k = own.k;
CREATE INDEX temp.matched_by_number ON matched (number);
"""
"""Which items the lines of an edited input take over."""


def _adopt(connection: sqlite3.Connection) -> None:
    """Let lines take over equal items whose own lines are gone.

    A line without an id takes any of them, those first for which most has been done; a line
    with a new id only one that had none: another id asks for another picture.
    """
    if connection.execute("SELECT 1 FROM items LIMIT 1").fetchone() is None:
        return
    for statement in _MATCH.split(";"):
        connection.execute(statement)
    # Those left over make way first: an identity belongs to one.
    connection.execute(
        "UPDATE items SET identity = 'left:' || number WHERE number IN (SELECT number FROM spare)"
        " AND (user_id IS NULL OR number IN (SELECT number FROM matched))"
    )
    connection.execute(
        "UPDATE items SET identity = matched.identity, user_id = matched.user_id "
        "FROM matched WHERE matched.number = items.number"
    )
    for table in ("lines", "edited", "free", "spare", "taken", "matched"):
        connection.execute(f"DROP TABLE temp.{table}")


def _merge(connection: sqlite3.Connection) -> None:
    """Queue what is new, keep what is known, note what is gone."""
    _adopt(connection)
    connection.execute("UPDATE items SET wanted = 0 WHERE wanted = 1")
    connection.execute(
        """
        INSERT INTO items (identity, user_id, digest, line, request, metadata, model, pictures,
                           queued_at)
        SELECT CASE WHEN user_id IS NOT NULL THEN 'id:' || user_id
                    ELSE 'sha256:' || digest || ':' || row_number() OVER
                         (PARTITION BY user_id IS NULL, digest ORDER BY line) END,
               user_id, digest, line, request, metadata, model, pictures, ?
        FROM incoming WHERE true ORDER BY line
        ON CONFLICT (identity) DO UPDATE SET
            wanted = 1, line = excluded.line, metadata = excluded.metadata,
            -- Only an item that was never paid for can get here with another request.
            state = iif(digest = excluded.digest, state, 'queued'),
            retryable = iif(digest = excluded.digest, retryable, 0),
            code = iif(digest = excluded.digest, code, NULL),
            message = iif(digest = excluded.digest, message, NULL),
            credits_before = credits_before
                + iif(digest = excluded.digest, 0, coalesce(credits_used, 0)),
            credits_used = iif(digest = excluded.digest, credits_used, NULL),
            credits_reserved = iif(digest = excluded.digest, credits_reserved, NULL),
            idempotency_key = iif(digest = excluded.digest, idempotency_key, NULL),
            task_id = iif(digest = excluded.digest, task_id, NULL),
            snapshot = iif(digest = excluded.digest, snapshot, NULL),
            stem = iif(digest = excluded.digest, stem, NULL),
            queued_at = iif(digest = excluded.digest, queued_at, excluded.queued_at),
            submitting_at = iif(digest = excluded.digest, submitting_at, NULL),
            submitted_at = iif(digest = excluded.digest, submitted_at, NULL),
            completed_at = iif(digest = excluded.digest, completed_at, NULL),
            ended_at = iif(digest = excluded.digest, ended_at, NULL),
            request = excluded.request, model = excluded.model,
            pictures = excluded.pictures, digest = excluded.digest
        """,
        (time.time(),),
    )
    connection.execute("DELETE FROM incoming")
    # An item without a name for its files has none: those it had are of another request.
    connection.execute(
        "DELETE FROM files WHERE item IN (SELECT number FROM items WHERE stem IS NULL)"
    )


# ---------------------------------------------------------------------------------------------
# Rows


def _page(
    connection: sqlite3.Connection, states: Sequence[str], after: tuple[int, int], limit: int
) -> tuple[Item, ...]:
    among = f"state IN ({', '.join('?' * len(states))}) AND" if states else ""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM items WHERE {among} (line, number) > (?, ?) AND {_RELEVANT} "  # noqa: S608 - ours
        "ORDER BY line, number LIMIT ?",
        (*states, *after, limit),
    ).fetchall()
    return tuple(_item(connection, row) for row in rows)


def _item(connection: sqlite3.Connection, row: tuple[Any, ...]) -> Item:
    return Item(
        number=row[0],
        identity=row[1],
        user_id=row[2],
        line=row[3],
        wanted=bool(row[4]),
        request=json.loads(row[5]),
        metadata=json.loads(row[6]) if row[6] is not None else {},
        model=row[7],
        pictures=row[8],
        state=row[9],
        idempotency_key=row[10],
        task_id=row[11],
        snapshot=json.loads(row[12]) if row[12] is not None else None,
        stem=row[13],
        code=row[14],
        message=row[15],
        retryable=bool(row[16]),
        credits_reserved=row[17],
        credits_used=row[18],
        times={name: at for name, at in zip(_TIMES, row[19:], strict=True) if at is not None},
        files=tuple(_files(connection, row[0]).values()),
    )


def _files(connection: sqlite3.Connection, number: int) -> dict[int, File]:
    rows = connection.execute(
        "SELECT position, name, sha256, bytes FROM files WHERE item = ? ORDER BY position",
        (number,),
    )
    return {k: File(name=name, sha256=sha256, bytes=size) for k, name, sha256, size in rows}


def _counts(connection: sqlite3.Connection) -> Counts:
    def table(sql: str) -> dict[str, Any]:
        return dict(connection.execute(sql).fetchall())

    def number(sql: str) -> Any:
        return connection.execute(sql).fetchone()[0]

    return Counts(
        states=table(f"SELECT state, count(*) FROM items WHERE {_RELEVANT} GROUP BY state"),  # noqa: S608 - ours
        pictures=table(
            "SELECT model, sum(pictures) FROM items WHERE state = 'queued' AND wanted = 1 "
            "GROUP BY model"
        ),
        spent=number(
            # What failed was given back, unless the API says otherwise.
            "SELECT coalesce(sum(credits_before + coalesce(credits_used, "  # noqa: S608 - ours
            f"iif(state IN {_PAID}, credits_reserved, 0), 0)), 0) FROM items"
        ),
        unstated=table(
            "SELECT model, sum(pictures) FROM items WHERE credits_used IS NULL AND "  # noqa: S608 - ours
            f"credits_reserved IS NULL AND (state IN {_PAID} OR state = 'failed' AND code IN "
            "('results_expired', 'task_not_found', 'no_results')) GROUP BY model"
        ),
        prices=table(
            # What a failed one used is no price: perhaps nothing.
            "SELECT model, max(price) FROM (SELECT model, max(coalesce(credits_reserved, used), "
            "coalesce(used, credits_reserved)) / pictures AS price FROM (SELECT *, "
            "iif(state = 'failed', NULL, credits_used) AS used FROM items)) "
            "WHERE price IS NOT NULL GROUP BY model"
        ),
        doubtful=table(
            "SELECT model, sum(pictures) FROM items WHERE state = 'uncertain' GROUP BY model"
        ),
        retryable=number(
            "SELECT count(*) FROM items WHERE state = 'failed' AND wanted = 1 AND retryable = 1"
        ),
        expired=number(
            "SELECT count(*) FROM items WHERE state = 'failed' AND wanted = 1 "
            "AND code IN ('results_expired', 'task_not_found')"
        ),
    )
