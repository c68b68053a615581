"""The one thread that has the ledger's file open: its tables, lock, commits and errors.

The event loop never waits for a disk. A change is one ``await`` that returns once the change is
on disk; changes that wait at the same time share one transaction, and so one flush. A change
is made in its turn even if its caller is cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from attrs import define, field

from evolink_async._clock import Clock, LoopClock, hold
from evolink_async.errors import LedgerError

__all__ = ["Connection", "Work", "committed"]

C = TypeVar("C", bound="Connection")
P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
"""Something to do with the connection, in the ledger's thread."""

LOCK: Final = "ledger.lock"
RESERVE: Final = "ledger.reserve"
RESERVED: Final = 1 << 20
"""Bytes kept for the ledger: on a full disk, what was paid for can still be recorded."""
FULL_DISK_PAUSES: Final = (0.0, 0.1, 0.3, 0.6)
"""Seconds between attempts on a full disk: a download that fills it removes its file."""
GROUP: Final = 64
"""Most changes in one transaction: their callers wake in one turn of the event loop."""
_APPLICATION: Final = 0x45764C6B
"""SQLite's ``application_id`` of our files: "EvLk"."""
_FORMAT: Final = 4
"""SQLite's ``user_version`` of our files: that of the tables below; 1 to 3 were not released."""

_TABLES: Final = """
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
CREATE TABLE owner (api TEXT NOT NULL, salt BLOB NOT NULL, key_digest BLOB);
"""


@define(eq=False)
class _Change:
    """Something to do in a transaction, and the future that hears of it."""

    work: Work[Any]
    done: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


@define(eq=False)
class Connection:
    """The ledger's file, used by a thread of its own; meanwhile *clock* is held, if it can be."""

    path: Path
    clock: Clock = field(factory=LoopClock)
    _executor: ThreadPoolExecutor = field(
        factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="evolink-ledger"),
        init=False,
    )
    _waiting: deque[_Change] = field(factory=deque, init=False)
    _opened: dict[Path, tuple[int, int] | None] = field(factory=dict, init=False)
    _db: sqlite3.Connection = field(init=False)
    _closing: contextlib.ExitStack = field(factory=contextlib.ExitStack, init=False)

    # -- for the event loop ----------------------------------------------------------------

    async def open(self) -> None:
        """Lock the folder and open the file, making it if need be; close it also after an error.

        Raises:
            LedgerError: It is in use, of a newer format, damaged, or cannot be written.
        """
        with hold(self.clock):
            await asyncio.get_running_loop().run_in_executor(self._executor, self._open)

    async def _do(self, work: Work[T]) -> T:
        """Have *work* done in a transaction, shared with others that wait."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Change(work, done))
        self._executor.submit(self._do_waiting)
        with hold(self.clock):
            return await done

    async def close(self) -> None:
        """Do what is waiting, then close the file."""
        closed = self._executor.submit(self._close)
        self._executor.shutdown(wait=False)
        # A cancelled caller does not keep the file from being closed.
        await asyncio.shield(asyncio.wrap_future(closed))

    # -- in the thread ---------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._closing.callback(_lock(self.path).close)
            self._db = _connect(self.path)
            self._closing.callback(self._db.close)
        except sqlite3.Error as exc:
            raise _ledger_error(exc, self.path) from exc
        lock, log = self._beside
        for path in (lock, self.path, log):
            if path != log or log.exists():  # SQLite keeps no log on some network drives
                self._opened[path] = _file_id(path)
        _reserve(self.path)
        self._closing.callback(_release, self.path)

    def _close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._closing.close()

    def _do_waiting(self) -> None:
        """Do the changes that wait; often an earlier call has done them already."""
        changes = [self._waiting.popleft() for _ in range(min(len(self._waiting), GROUP))]
        if not changes:
            return
        try:
            self._do_with_room(changes)
        except BaseException as exc:  # noqa: BLE001 - it belongs to the callers
            error = _ledger_error(exc, self.path) if isinstance(exc, sqlite3.Error) else exc
            for change in changes:
                change.error = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            changes[0].done.get_loop().call_soon_threadsafe(_settle, changes)

    def _do_with_room(self, changes: Sequence[_Change]) -> None:
        """Do *changes*; if the disk is full, again in the room kept for that."""
        for pause in FULL_DISK_PAUSES:
            try:
                return self._transact(changes)
            except sqlite3.OperationalError as exc:
                if not _name(exc).startswith("SQLITE_FULL"):
                    raise
                _release(self.path)
                time.sleep(pause)
        return self._transact(changes)

    def _transact(self, changes: Sequence[_Change]) -> None:
        """Do *changes* in one transaction: all, or none."""
        self._db.execute("BEGIN")
        try:
            for change in changes:
                try:
                    change.result, change.error = change.work(self._db), None
                except LedgerError as exc:  # refused before anything was changed
                    change.error = exc
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # -- in any thread ---------------------------------------------------------------------

    def _loss(self, path: Path) -> str | None:
        """``removed`` or ``replaced`` if an opened file has lost its name; None if not."""
        now = _file_id(path)
        if path not in self._opened or (now is not None and now == self._opened[path]):
            return None
        return "removed" if now is None else "replaced"

    def _check_files(self) -> None:
        """See that others would open the same ledger, and be kept out by the same lock.

        Raises:
            LedgerError: They would not.
        """
        lock, log = self._beside
        for path, use, advice in (
            (self.path, "was in use", "a new ledger knows nothing of what was paid for"),
            (lock, "kept other processes out", "see that no other process uses the folder"),
            (log, "held the latest changes", "see that nobody clears the folder"),
        ):
            if (loss := self._loss(path)) is not None:
                raise LedgerError(
                    f"{path} was {loss} while it {use}; nothing more is submitted: {advice}, and "
                    "see the report before the batch is run again",
                    path=self.path,
                )

    @property
    def _beside(self) -> tuple[Path, Path]:
        """The lock, and SQLite's log."""
        return self.path.with_name(LOCK), self.path.with_name(f"{self.path.name}-wal")


def committed(
    work: Callable[Concatenate[C, P], T],
) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """Make *work*, which is done in the ledger's thread, a method of the event loop."""

    @functools.wraps(work)
    async def method(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._do(lambda _: work(self, *args, **kwargs))

    return method


def _settle(changes: Sequence[_Change]) -> None:
    """Wake the callers, all in one turn of the event loop."""
    for change in changes:
        if change.done.cancelled():
            continue
        if change.error is not None:
            change.done.set_exception(change.error)
        else:
            change.done.set_result(change.result)


# ---------------------------------------------------------------------------------------------
# Opening


def _lock(path: Path) -> sqlite3.Connection:
    """Hold the folder for this process; the system lets go when the process ends, however.

    SQLite's own file locks, of an empty database, are the lock that works everywhere. The
    ledger itself stays readable for others.
    """
    lock = sqlite3.connect(path.with_name(LOCK), timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as exc:
        lock.close()
        if _name(exc).startswith("SQLITE_BUSY"):
            raise LedgerError(
                f"the ledger {path} is in use by another process; wait until it has finished, "
                "or stop it",
                path=path,
            ) from exc
        raise
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """See that the file is a ledger that can be used, and make one of an empty file.

    Raises:
        LedgerError: It is something else, or of another format.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (version and application != _APPLICATION) or (tables and not version):
        raise LedgerError(f"{path} is not a ledger; choose another folder", path=path)
    if version not in {0, _FORMAT}:
        advice = "upgrade evolink-async" if version > _FORMAT else "choose another folder"
        raise LedgerError(
            f"the ledger {path} has format {version}, this version of evolink-async knows "
            f"format {_FORMAT} only; {advice}",
            path=path,
        )
    connection.executescript(
        # The two for macOS, whose ordinary flush stops at the drive's cache.
        "PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON;"
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
        "PRAGMA journal_size_limit = 16777216; PRAGMA foreign_keys = ON;"
    )
    if not version:
        connection.executescript(
            f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION};"
            f"PRAGMA user_version = {_FORMAT}; COMMIT;"
        )


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


# ---------------------------------------------------------------------------------------------
# The reserve


def _reserve(path: Path) -> None:
    """Take the reserve; if there is no room for it now, the first full commit says so."""
    reserve = path.with_name(RESERVE)
    with contextlib.suppress(OSError):
        if not reserve.exists() or (_is_reserve(reserve) and reserve.stat().st_size != RESERVED):
            reserve.write_bytes(bytes(RESERVED))


def _release(path: Path) -> None:
    """Give the reserve back."""
    reserve = path.with_name(RESERVE)
    with contextlib.suppress(OSError):
        if _is_reserve(reserve):
            reserve.unlink()


def _is_reserve(path: Path) -> bool:
    """False for somebody else's file of that name."""
    return path.stat().st_size <= RESERVED and not any(path.read_bytes())


# ---------------------------------------------------------------------------------------------
# Errors


def _ledger_error(exc: sqlite3.Error, path: Path) -> LedgerError:
    """*exc* as an error of ours, with what to do."""
    known = {
        "SQLITE_FULL": "; make room on the disk and run the same command again",
        "SQLITE_NOTADB": "; it is not a ledger, choose another folder",
        "SQLITE_CORRUPT": "; restore it from a copy, or choose another folder",
        "SQLITE_READONLY": "; make it writable",
        "SQLITE_CANTOPEN": "; make the folder writable, or choose another one",
        "SQLITE_BUSY": "; another program is writing to it",
    }
    advice = next((text for start, text in known.items() if _name(exc).startswith(start)), "")
    error = LedgerError(f"the ledger {path} cannot be used: {exc}{advice}", path=path)
    error.__cause__ = exc
    return error


def _name(exc: BaseException) -> str:
    """SQLite's name of an error, e.g. ``SQLITE_FULL``."""
    return getattr(exc, "sqlite_errorname", "")
