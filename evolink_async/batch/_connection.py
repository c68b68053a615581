"""The one thread that has the ledger's file open: its lock, its commits, its errors.

The event loop never waits for a disk. A change is one ``await`` that returns once the change is
on disk; changes that wait at the same time share one transaction, and so one flush. A change
is made in its turn even if its caller is cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from attrs import define, field

from evolink_async.batch._schema import prepare
from evolink_async.errors import LedgerError

__all__ = ["Connection", "Work"]

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


@define(eq=False)
class _Change:
    """Something to do in a transaction, and the future that hears of it."""

    work: Work[Any]
    done: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


@define(eq=False)
class Connection:
    """The ledger's file, used by a thread of its own."""

    path: Path
    _executor: ThreadPoolExecutor = field(init=False)
    _waiting: deque[_Change] = field(factory=deque, init=False)
    _opened: dict[Path, tuple[int, int] | None] = field(factory=dict, init=False)
    _lock: sqlite3.Connection | None = field(default=None, init=False)
    _connection: sqlite3.Connection | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evolink-ledger")

    # -- for the event loop ----------------------------------------------------------------

    async def open(self) -> None:
        """Lock the folder and open the file, making it if need be.

        Raises:
            LedgerError: It is in use, of a newer format, damaged, or cannot be written.
        """
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._open)
        except BaseException:
            await self.close()
            raise

    async def do(self, work: Work[T]) -> T:
        """Have *work* done in a transaction, shared with others that wait."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Change(work, done))
        self._executor.submit(self._do_waiting)
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
            self._lock = _lock(self.path)
            self._connection = _connect(self.path)
        except sqlite3.Error as exc:
            raise _ledger_error(exc, self.path) from exc
        log = self._log_path
        for path in (self.path.with_name(LOCK), self.path, log):
            if path != log or log.exists():  # SQLite keeps no log on some network drives
                self._opened[path] = _file_id(path)
        _reserve(self.path)

    def _close(self) -> None:
        if self._connection is not None:
            _release(self.path)
        for opened in (self._connection, self._lock):
            if opened is not None:
                with contextlib.suppress(sqlite3.Error):
                    opened.close()
        self._connection = self._lock = None

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
                return self._do(changes)
            except sqlite3.OperationalError as exc:
                if not _name(exc).startswith("SQLITE_FULL"):
                    raise
                _release(self.path)
                time.sleep(pause)
        return self._do(changes)

    def _do(self, changes: Sequence[_Change]) -> None:
        """Do *changes* in one transaction: all, or none."""
        connection = self._connection
        if connection is None:
            raise AssertionError(self.path)
        with _transaction(connection):
            for change in changes:
                try:
                    change.result, change.error = change.work(connection), None
                except LedgerError as exc:  # refused before anything was changed
                    change.error = exc

    # -- in any thread ---------------------------------------------------------------------

    def loss(self) -> str | None:
        """``removed`` or ``replaced`` if the open ledger has lost its name; None if not."""
        now = _file_id(self.path)
        if now is None:
            return "removed"
        return None if now == self._opened.get(self.path) else "replaced"

    def check_files(self) -> None:
        """See that others would open the same ledger, and be kept out by the same lock.

        Raises:
            LedgerError: They would not.
        """
        if (loss := self.loss()) is not None:
            raise LedgerError(
                f"the ledger {self.path} was {loss} while it was in use; nothing more is "
                "submitted, for a new one knows nothing of what was paid for: see the report "
                "before the batch is run again",
                path=self.path,
            )
        if self._is_other(self.path.with_name(LOCK)):
            raise LedgerError(
                f"{self.path.with_name(LOCK)} was removed or replaced while it kept other "
                "processes out; nothing more is submitted: see that no other process uses the "
                "folder, then run the same batch again",
                path=self.path,
            )
        if self._is_other(self._log_path):
            raise LedgerError(
                f"{self._log_path} was removed or replaced while it held the latest changes; "
                "nothing more is submitted: see that nobody clears the folder, then run the "
                "same batch again",
                path=self.path,
            )

    @property
    def _log_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}-wal")

    def _is_other(self, path: Path) -> bool:
        """Whether *path* is no longer the file that was opened under that name."""
        now = _file_id(path)
        return path in self._opened and (now is None or now != self._opened[path])


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
        prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


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
# Transactions and errors


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


def _ledger_error(exc: BaseException, path: Path) -> LedgerError:
    error = LedgerError(f"the ledger {path} cannot be used: {exc}{_advice(exc)}", path=path)
    error.__cause__ = exc
    return error


def _advice(exc: BaseException) -> str:
    known = {
        "SQLITE_FULL": "; make room on the disk and run the same command again",
        "SQLITE_NOTADB": "; it is not a ledger, choose another folder",
        "SQLITE_CORRUPT": "; restore it from a copy, or choose another folder",
        "SQLITE_READONLY": "; make it writable",
        "SQLITE_CANTOPEN": "; make the folder writable, or choose another one",
        "SQLITE_BUSY": "; another program is writing to it",
    }
    return next((text for start, text in known.items() if _name(exc).startswith(start)), "")


def _name(exc: BaseException) -> str:
    """SQLite's name of an error, e.g. ``SQLITE_FULL``."""
    return getattr(exc, "sqlite_errorname", "")
