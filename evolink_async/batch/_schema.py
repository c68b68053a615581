"""The tables of a ledger, and how a file is known to be one."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from evolink_async.errors import LedgerError

__all__ = ["prepare"]

_APPLICATION: Final = 0x45764C6B
"""SQLite's ``application_id`` of our files: "EvLk"."""
_FORMAT: Final = 1
"""SQLite's ``user_version`` of our files: the format of the tables below."""

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


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """See that the file is a ledger that can be used, and make one of an empty file.

    Raises:
        LedgerError: It is something else, or of a newer format.
    """
    version = _pragma(connection, "user_version")
    foreign = version and _pragma(connection, "application_id") != _APPLICATION
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if foreign or (tables and not version):
        raise LedgerError(f"{path} is not a ledger; choose another folder", path=path)
    if version > _FORMAT:
        raise LedgerError(
            f"the ledger {path} has format {version}, this version of evolink-async knows "
            f"formats up to {_FORMAT}; upgrade evolink-async",
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


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
