"""Changes of a ledger that take more than one statement. Each runs in a transaction."""

from __future__ import annotations

import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from evolink_async.batch._rows import File
from evolink_async.errors import LedgerError

__all__ = [
    "EMULATOR",
    "Fingerprint",
    "claim",
    "completed",
    "disown",
    "once",
    "replace",
    "requeue_failed",
    "restore",
    "saved",
    "unsaved",
]

Fingerprint = Callable[[bytes], bytes]
"""Makes a salted hash of an API key."""
EMULATOR: Final = "emulator"
"""The name of every embedded emulator: each has another port."""


_QUEUED: Final = (
    "UPDATE items SET state = 'queued', idempotency_key = NULL, task_id = NULL, snapshot = NULL, "
    "stem = NULL, code = NULL, message = NULL, retryable = 0, credits_before = credits_before + "
    "coalesce(credits_used, 0), credits_reserved = NULL, credits_used = NULL, queued_at = ?, "
    "submitting_at = NULL, submitted_at = NULL, completed_at = NULL, ended_at = NULL "
    "WHERE number = ?"
)
"""Queues an item anew; what it has cost so far is kept in ``credits_before``."""
_REPLACED: Final = "state IN ('queued', 'submitting') AND task_id IS NOT NULL"
"""True for an item that is being bought anew and still has its former task."""


def replace(connection: sqlite3.Connection, sql: str, values: tuple[Any, ...]) -> None:
    """Change one item, and forget its former task if it was bought anew."""
    _forget(connection, f"number = {int(values[-1])} AND {_REPLACED}")
    once(connection, sql, values)


def _forget(connection: sqlite3.Connection, which: str) -> None:
    """Remove the former task and files of items, and keep what they have cost."""
    connection.execute(
        f"DELETE FROM files WHERE item IN (SELECT number FROM items WHERE {which})"  # noqa: S608 - ours
    )
    connection.execute(
        "UPDATE items SET credits_before = credits_before + coalesce(credits_used, 0), "  # noqa: S608 - ours
        "credits_used = NULL, credits_reserved = NULL, task_id = NULL, snapshot = NULL, "
        f"stem = NULL, submitted_at = NULL, completed_at = NULL WHERE {which}"
    )


def restore(connection: sqlite3.Connection) -> None:
    """Items that were to be bought anew, and were not, have failed as before."""
    connection.execute(
        "UPDATE items SET state = 'failed', ended_at = ? "
        "WHERE state = 'queued' AND task_id IS NOT NULL",
        (time.time(),),
    )


def once(connection: sqlite3.Connection, sql: str, values: tuple[Any, ...]) -> None:
    """Change exactly one item."""
    if connection.execute(sql, values).rowcount != 1:
        raise AssertionError(values)  # a mistake of ours, which must not cost money


_OWNED: Final = (
    "SELECT 1 FROM items WHERE task_id IS NOT NULL OR state IN ('submitting', 'uncertain') "
    "OR credits_before > 0"
)
"""Finds out whether the ledger has tasks, or may have some, that only one API knows."""


def claim(
    connection: sqlite3.Connection,
    path: Path,
    *,
    api: str,
    fingerprint: Fingerprint | None,
    replace_key: bool,
) -> None:
    """Record the owner of the tasks, or see that it is still the same."""
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


def disown(connection: sqlite3.Connection) -> None:
    """What a process that is gone was submitting is uncertain."""
    restore(connection)
    _forget(connection, f"state = 'submitting' AND {_REPLACED}")
    connection.execute(
        "UPDATE items SET state = 'uncertain', code = 'submit_uncertain', ended_at = ?, "
        "message = 'the process ended while this was being submitted' WHERE state = 'submitting'",
        (time.time(),),
    )


_LOST: Final = "iif(code = 'results_expired', code, NULL)"
"""Keeps the code of lost results until they are found: without it none may be bought anew."""


def completed(
    connection: sqlite3.Connection,
    *,
    number: int,
    snapshot: str,
    used: float | None,
    stems: Iterable[str],
) -> str:
    """Record a result and the stem of its files' names, which is returned."""
    stem: str | None = connection.execute(
        "SELECT stem FROM items WHERE number = ?", (number,)
    ).fetchone()[0]
    if stem is None:
        stem = _free_stem(connection, number, stems)
    once(
        connection,
        f"UPDATE items SET state = 'completed', code = {_LOST}, message = NULL, snapshot = ?, "  # noqa: S608 - ours
        "stem = ?, credits_used = ?, completed_at = coalesce(completed_at, ?) WHERE number = ?",
        (snapshot, stem, used, time.time(), number),
    )
    return stem


def _free_stem(connection: sqlite3.Connection, number: int, stems: Iterable[str]) -> str:
    """The first of *stems* that no other item has, in whatever case."""
    taken = "SELECT 1 FROM items WHERE stem = ? COLLATE NOCASE AND number != ?"
    stem = ""
    for stem in stems:
        if connection.execute(taken, (stem, number)).fetchone() is None:
            return stem
    return f"{stem}-{number}"


def saved(connection: sqlite3.Connection, *, number: int, files: Sequence[File]) -> None:
    """All files of an item are on disk."""
    now = time.time()
    once(
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


def unsaved(
    connection: sqlite3.Connection, *, number: int, files: Mapping[int, File], message: str
) -> None:
    """Only these files of an item are on disk, for that reason."""
    once(
        connection,
        f"UPDATE items SET code = coalesce({_LOST}, 'download_failed'), message = ? "  # noqa: S608 - ours
        "WHERE number = ?",
        (message, number),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO files (item, position, name, sha256, bytes) VALUES (?, ?, ?, ?, ?)",
        [(number, k, f.name, f.sha256, f.bytes) for k, f in files.items()],
    )


def requeue_failed(connection: sqlite3.Connection) -> int:
    """Queue the failed items that are retryable; these have no files."""
    return connection.execute(
        _QUEUED.replace("WHERE number = ?", "WHERE state = 'failed' AND wanted = 1 AND retryable"),
        (time.time(),),
    ).rowcount
